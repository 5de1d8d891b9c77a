"""Prompt strings and contexts: character by character what diffusers' AceStepPipeline feeds the model at inference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from acestep_lora.conditioning import COVER, TEXT2MUSIC, Conditioning, hint_context, silence_context
from acestep_lora.data.track import TAG_POSITIONS, Track

TRACK = Track(id="a.mp3", path=Path("a.mp3"), caption="lofi, warm piano", lyrics="[Verse 1]\nla la", language="ja")

words = st.text(st.characters(blacklist_categories=["Cs"]), max_size=60)
tracks = st.builds(
    Track,
    id=st.just("a.mp3"),
    path=st.just(Path("a.mp3")),
    caption=words,
    genre=words,
    lyrics=words,
    bpm=st.none() | st.integers(30, 300),
    keyscale=st.sampled_from(["", "C major", "F# minor", "Bb major"]),
    timesignature=st.sampled_from(["", "2", "3", "4", "6"]),
    language=st.sampled_from(["unknown", "en", "ja", "yue"]),
    custom_tag=st.sampled_from(["", "zzz", "{tag}"]),
    tag_position=st.sampled_from(TAG_POSITIONS),
)


def inference(track: Track, caption: str, instruction: str | None, duration: float) -> tuple[str, str]:
    """Prompt and lyrics as diffusers builds them; it needs no weights for that."""
    pipeline = AceStepPipeline.__new__(AceStepPipeline)
    return pipeline._format_prompt(
        track.prompt(caption),
        track.lyrics,
        track.language,
        duration,
        instruction,
        track.bpm,
        track.keyscale,
        track.timesignature,
    )


@given(tracks, st.floats(0.5, 5000))
def test_strings_are_those_of_inference(track, duration):
    conditioning = Conditioning(lm_hints=0.5)
    variants = conditioning.variants(track)
    assert set(variants) == {"caption", "caption_hint"} | ({"genre", "genre_hint"} if track.genre else set())
    for name, (caption, instruction) in variants.items():
        source = track.genre if name.startswith("genre") else track.caption
        prompt, lyrics = inference(track, source, instruction, duration)
        assert conditioning.prompt(track, caption, instruction, duration) == prompt
        assert conditioning.lyrics(track) == lyrics
        assert name.endswith("_hint") == (instruction == COVER)


def test_text2music_instruction_is_the_pipelines_default():
    prompt, _ = inference(TRACK, "lofi", None, 3.7)
    assert Conditioning().prompt(TRACK, "lofi", TEXT2MUSIC, 3.7) == prompt


def test_strings_spelt_out():
    track = replace(TRACK, bpm=92, keyscale="D minor", timesignature="3", custom_tag="zzz", genre="lofi")
    assert Conditioning().prompt(track, *Conditioning().variants(track)["caption"], 12.9) == (
        "# Instruction\nFill the audio semantic mask based on the given conditions:\n\n"
        "# Caption\nzzz, lofi, warm piano\n\n"
        "# Metas\n- bpm: 92\n- timesignature: 3\n- keyscale: D minor\n- duration: 12 seconds\n<|endoftext|>\n"
    )
    assert Conditioning().lyrics(track) == "# Languages\nja\n\n# Lyric\n[Verse 1]\nla la<|endoftext|>"


def test_variants_without_hints_or_genre():
    assert Conditioning().variants(TRACK) == {"caption": ("lofi, warm piano", TEXT2MUSIC)}
    with_genre = Conditioning().variants(replace(TRACK, genre="lofi"))
    assert with_genre == {"caption": ("lofi, warm piano", TEXT2MUSIC), "genre": ("lofi", TEXT2MUSIC)}


def test_upstream_feeds_raw_lyrics_and_the_same_prompt(configure):
    upstream, inference = (
        instantiate(configure("preprocess", f"conditioning={name}").conditioning) for name in ("upstream", "inference")
    )
    assert upstream == Conditioning(lyric_header=False, lyric_tokens=512, padded=True, silence_timbre=False)
    assert inference == Conditioning()
    assert upstream.lyrics(TRACK) == "[Verse 1]\nla la"
    assert upstream.prompt(TRACK, "lofi", TEXT2MUSIC, 9) == inference.prompt(TRACK, "lofi", TEXT2MUSIC, 9)


CHANGES = {
    "caption": replace(TRACK, caption="other"),
    "genre": replace(TRACK, genre="lofi"),
    "tag": replace(TRACK, custom_tag="zzz"),
    "lyrics": replace(TRACK, lyrics="[Verse 1]"),
    "language": replace(TRACK, language="en"),
    "bpm": replace(TRACK, bpm=90),
    "key": replace(TRACK, keyscale="C major"),
    "signature": replace(TRACK, timesignature="4"),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_key_follows_the_words(changed):
    assert Conditioning().key(changed, 9.0) != Conditioning().key(TRACK, 9.0)


def test_key_ignores_what_the_model_is_not_told():
    untold = replace(TRACK, id="b.mp3", path=Path("b.mp3"), repeat=3, duration=7.0, prompt_override="genre")
    assert Conditioning().key(untold, 9.0) == Conditioning().key(TRACK, 9.9)
    assert Conditioning().key(TRACK, 9.0) != Conditioning().key(TRACK, 10.0)


@pytest.mark.parametrize(
    "options",
    [{"text_tokens": 128}, {"lyric_tokens": 512}, {"padded": True}, {"silence_timbre": False}, {"lm_hints": 1}],
)
def test_key_follows_the_way_of_encoding(options):
    assert Conditioning(**options).key(TRACK, 9.0) != Conditioning().key(TRACK, 9.0)


def test_key_does_not_follow_the_probability_of_hints():
    assert Conditioning(lm_hints=0.1).key(TRACK, 9.0) == Conditioning(lm_hints=0.9).key(TRACK, 9.0)


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_hints_are_a_probability(probability):
    with pytest.raises(ValueError, match=str(probability)):
        Conditioning(lm_hints=probability)


@given(st.integers(1, 7), st.integers(1, 30))
def test_silence_is_tiled_from_its_start(length, frames):
    silence = torch.arange(2.0 * length).view(length, 2)
    context = silence_context(silence, frames)
    assert context.shape == (frames, 4)
    assert torch.equal(context[:, :2], silence[torch.arange(frames) % length])
    assert (context[:, 2:] == 1).all()


def test_hints_stand_where_silence_would():
    hints = torch.randn(5, 3)
    context = hint_context(hints)
    assert torch.equal(context, torch.cat([hints, torch.ones(5, 3)], dim=1))
