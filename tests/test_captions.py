"""Captions: what fits, what is measured, and what models answer, over HTTP where they are behind an API."""

import base64
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import services
import soundfile
from builders import NANO
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from acestep_lora import cli
from acestep_lora.annotate import captions
from acestep_lora.annotate.captions import RATE, checked, describe, estimate_tokens, measure, token_count
from acestep_lora.annotate.omni import Omni
from acestep_lora.annotate.provider import Provider, ProviderDown, ProviderError
from acestep_lora.conditioning import COVER, TEXT2MUSIC, Conditioning, shorten
from acestep_lora.data import fields
from acestep_lora.data.track import TAG_POSITIONS, Track, scan
from acestep_lora.errors import UserError
from acestep_lora.hardware import Hardware

TRACK = Track(id="a.wav", path=Path("a.wav"))
TOKENIZER = AutoTokenizer.from_pretrained(NANO / "tokenizer")
KEYS = {"gemini": "GEMINI_API_KEY", "openai": "OPENAI_API_KEY"}


def tokens(text: str) -> int:
    return len(TOKENIZER(text).input_ids)


# ---------------------------------------------------------------- the text that the model sees

prose = st.text(st.characters(codec="utf-8"), max_size=80)
long = st.builds(lambda parts, n: " ".join(parts * n), st.lists(prose, max_size=4), st.integers(1, 40))
songs = st.builds(
    Track,
    id=st.just("a"),
    path=st.just(Path("a")),
    caption=long,
    genre=long,
    lyrics=long | long.map(lambda text: text.replace(" ", "\n")),
    bpm=st.none() | st.integers(30, 300),
    keyscale=st.sampled_from(["", "C major", "G# minor"]),
    timesignature=st.sampled_from(["", "2", "3", "4", "6"]),
    language=st.sampled_from(["unknown", "en", "yue"]),
    custom_tag=st.just("") | prose | long,
    tag_position=st.sampled_from(TAG_POSITIONS),
)


@settings(deadline=None)
@given(songs, st.sampled_from([TEXT2MUSIC, COVER]), st.floats(0.5, 9000), st.booleans())
def test_metas_and_end_of_text_are_whole(track, instruction, duration, small):
    """For any caption, genre, lyrics and tag: a tokenizer that truncates has nothing to cut off."""
    conditioning = Conditioning(lyric_tokens=64 if small else 2048)
    metas = conditioning.prompt(replace(track, custom_tag=""), "", instruction, duration).split("\n\n# Metas\n")[1]

    def seen(text: str, limit: int) -> str:
        assert TOKENIZER(text, truncation=True, max_length=limit).input_ids == TOKENIZER(text).input_ids
        return TOKENIZER.decode(TOKENIZER(text).input_ids)

    for text in (track.caption, track.genre):
        try:
            kept = conditioning.fit_caption(track, text, instruction, duration, tokens)
        except UserError as error:
            assert "custom_tag" in str(error)
            assert tokens(conditioning.prompt(track, "", instruction, duration)) > 256
            continue
        prompt = conditioning.prompt(track, kept, instruction, duration)
        assert text.startswith(kept) and track.custom_tag in prompt
        assert seen(prompt, 256).endswith(f"\n\n# Metas\n{metas}<|endoftext|>")
    kept = conditioning.fit_lyrics(track, tokens)
    lyrics = conditioning.lyrics(replace(track, lyrics=kept))
    assert track.lyrics.startswith(kept)
    assert seen(lyrics, conditioning.lyric_tokens).endswith("<|endoftext|><|endoftext|>")


@pytest.mark.parametrize(
    "text, room, kept",
    [
        ("Warm piano. Soft drums. Rain.", 99, "Warm piano. Soft drums. Rain."),
        ("Warm piano. Soft drums. Rain.", 28, "Warm piano. Soft drums."),
        ("Warm piano. Soft drums. Rain.", 22, "Warm piano."),
        ("A warm piano and soft drums. Rain.", 24, "A warm piano and soft"),
        ("Feat. a warm piano and soft drums in the rain.", 30, "Feat. a warm piano and soft"),
        ("Lofi 静かな夜のピアノの音と雨", 12, "Lofi 静かな夜のピア"),
        ("Version 1.5 at last! (Or so he says.) And on", 38, "Version 1.5 at last! (Or so he says.)"),
        ("静かな夜。ピアノの音。雨", 9, "静かな夜。"),
        ("静かな夜のピアノの音", 4, "静かな夜"),
        ("Warm piano", 2, "Wa"),
        ("Warm piano", 0, ""),
    ],
)
def test_texts_are_cut_at_a_sentence_else_at_a_word(text, room, kept):
    assert shorten(text, lambda part: len(part) <= room) == kept


@settings(deadline=None)
@given(long, st.integers(0, 400))
def test_what_is_shortened_fits_and_keeps_half_of_what_could_be_kept(text, room):
    kept = shorten(text, lambda part: len(part) <= room)
    assert len(kept) <= room and text.startswith(kept)
    assert (kept == text) == (len(text) <= room)
    assert kept == text or 2 * len(kept) >= len(text[:room].rstrip())


@pytest.mark.parametrize(
    "caption, end", [("A warm piano plays over soft drums. " * 40, "drums."), ("piano " * 300, "piano")]
)
def test_captions_leave_room_for_metas_that_are_found_later(caption, end):
    """However a caption is measured, BPM, key, signature and any duration fit beside it when they become known."""
    for count in (tokens, estimate_tokens):
        answer = checked(replace(TRACK, custom_tag="zzz"), {"caption": caption, "genre": "lofi"}, count)
        assert answer.values["genre"] == "lofi"
        assert answer.values["caption"].endswith(end) and caption.startswith(answer.values["caption"])
        assert answer.problems == ("caption shortened to fit the text encoder's 256 tokens",)
        found = replace(TRACK, custom_tag="zzz", bpm=128, keyscale="G# minor", timesignature="4")
        for instruction in (TEXT2MUSIC, COVER):
            prompt = Conditioning().prompt(found, answer.values["caption"], instruction, 5999)
            assert 200 < count(prompt) <= 256


def test_tokens_are_counted_by_the_base_models_tokenizer(tmp_path):
    for folder in (NANO, NANO / "tokenizer"):
        assert token_count(str(folder))("lofi, warm piano") == tokens("lofi, warm piano")
    assert token_count(None) is estimate_tokens
    with pytest.raises(ProviderDown, match="holds no tokenizer.json"):
        token_count(str(tmp_path))


def test_tokens_are_estimated_from_above():
    """Counts by Qwen's rules: digits one by one, a sign beyond ASCII up to two or three bytes, long words in parts."""
    assert estimate_tokens("") == 1  # the end-of-text
    assert estimate_tokens("lofi") == 2
    assert estimate_tokens("128 BPM, piano!") == 1 + 3 + 1 + 1 + 2 + 1
    assert estimate_tokens("静か") == 5
    assert estimate_tokens("\n\n# Metas\n") == 1 + 3 + 1 + 2


@pytest.mark.parametrize(
    "caption, remark",
    [
        ("Fast trance at 138 BPM.", "138 BPM"),
        ("A waltz in F# minor.", "F# minor"),
        ("A waltz in B flat major.", "B flat major"),
        ("Soft lofi in A minor at 92 bpm.", None),
        ("A minor role for the piano, in plan B. Major chords.", "A minor"),
        ("Warm and slow.", None),
    ],
)
def test_a_made_up_tempo_or_key_in_the_words_is_told(caption, remark):
    answer = checked(replace(TRACK, bpm=92, keyscale="A minor"), {"caption": caption}, estimate_tokens)
    known = remark in (None, "A minor")
    assert answer.values == {"caption": caption}
    assert answer.problems == (() if known else (f"caption speaks of {remark}, which nobody measured: check it",))


def test_nothing_said_is_an_error():
    for said in ({}, {"caption": ""}, {"caption": " \n\x00"}, {"genre": "lofi"}, {"caption": None}):
        with pytest.raises(ProviderError, match="given no caption"):
            checked(TRACK, said, estimate_tokens)


def test_values_are_in_their_normal_form():
    said = {"caption": " Warm\n piano\x07 ", "genre": "", "language": "ja-JP"}
    assert checked(TRACK, said, estimate_tokens).values == {"caption": "Warm piano", "language": "ja"}
    odd = checked(TRACK, {"caption": "Warm", "language": "Klingon"}, estimate_tokens)
    assert odd.values == {"caption": "Warm"} and odd.problems[0].startswith("language 'Klingon' is not one of")


# ---------------------------------------------------------------- by rule

SECOND = np.arange(6 * RATE) / RATE


def noise(scale: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, len(SECOND)).astype(np.float32)


def tone(hertz: float, scale: float = 0.1) -> np.ndarray:
    return (scale * np.sin(2 * np.pi * hertz * SECOND)).astype(np.float32)


def test_what_is_measured_is_what_was_made():
    quiet, loud = measure(tone(440, 0.01), RATE), measure(tone(440, 0.5), RATE)
    assert quiet.loudness == pytest.approx(20 * np.log10(0.01 / np.sqrt(2)), abs=0.1)
    assert loud.loudness - quiet.loudness == pytest.approx(20 * np.log10(50), abs=0.1)
    assert loud.brightness == pytest.approx(440, rel=0.05)
    assert measure(tone(3000), RATE).brightness == pytest.approx(3000, rel=0.05)
    assert loud.attack < 0.02 and loud.dynamics < 1
    assert measure(np.concatenate([noise(0.005), tone(440, 0.5)]), RATE).brightness == pytest.approx(440, rel=0.1)
    clicks = np.zeros_like(SECOND, dtype=np.float32)
    clicks[:: RATE // 4] = 1.0
    assert measure(clicks, RATE).attack > 0.9
    swell = tone(440, 0.5) * np.where(SECOND < 3, 1.0, 0.05).astype(np.float32)
    assert measure(swell, RATE).dynamics == pytest.approx(26, abs=1.5)


@pytest.mark.parametrize(
    "samples, track, caption",
    [
        (tone(300), TRACK, "A dark instrumental piece. It has soft, sustained sounds and a steady level."),
        (
            noise(0.4),
            replace(TRACK, bpm=160, keyscale="A minor", lyrics="la la"),
            "A very fast, loud, bright song with vocals in A minor. "
            "It has sharp, percussive attacks and a steady level.",
        ),
        (
            tone(1500, 0.01) * np.where(SECOND < 3, 1.0, 0.05),
            replace(TRACK, bpm=79),
            "A slow, quiet instrumental piece. It has soft, sustained sounds and wide dynamics.",
        ),
    ],
)
def test_words_say_what_was_measured(samples, track, caption):
    assert describe(measure(samples, RATE), track) == caption


def test_nothing_is_said_where_nothing_stands_out():
    middling = captions.Sound(loudness=-18, dynamics=10, brightness=1700, attack=0.1)
    assert describe(middling, TRACK) == "An instrumental piece."
    assert describe(middling, replace(TRACK, bpm=100)) == "A mid-tempo instrumental piece."


def test_demo_songs_get_a_caption_each():
    provider = captions.RuleBased()
    assert isinstance(provider, Provider)
    tracks = scan(cli.ROOT / "data/demo").tracks[::3]
    answers = [provider.annotate(track) for track in tracks]
    assert answers == [provider.annotate(track) for track in tracks]
    for track, answer in zip(tracks, answers, strict=True):
        assert set(answer.values) == {"caption"} and not answer.problems
        assert (" song with vocals" in answer.values["caption"]) == (not track.is_instrumental)
        assert not track.keyscale or f"in {track.keyscale}." in answer.values["caption"]


@pytest.mark.parametrize("left, right", [(0, 0), (1, -1)])
def test_silence_has_no_caption(tmp_path, left, right):
    """Also where it is silent as a whole only in mono, or in the middle."""
    sound = tone(440)[:RATE]
    middle = np.concatenate([np.zeros((70 * RATE, 2)), np.stack([sound, sound], axis=1), np.zeros((70 * RATE, 2))])
    for samples in (np.stack([left * sound, right * sound], axis=1), np.roll(middle, 70 * RATE, axis=0)):
        soundfile.write(tmp_path / "a.wav", samples, RATE)
        with pytest.raises(ProviderError, match="silent"):
            captions.RuleBased().annotate(replace(TRACK, path=tmp_path / "a.wav"))


def test_captions_come_to_lie_beside_the_songs(configure, tmp_path, capsys):
    import annotate

    soundfile.write(tmp_path / "a.wav", np.stack([tone(300)] * 2, axis=1), RATE)
    (tmp_path / "a.json").write_text('{"bpm": 70}')
    groups = ["captioner=rule_based", "tempo_key=none", "transcriber=none", "structure=none"]
    report = annotate.annotate(configure("annotate", f"dataset.dir={tmp_path}", "report=null", *groups))
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert written["caption"] == "A slow, dark instrumental piece. It has soft, sustained sounds and a steady level."
    assert written["provenance"]["caption"] == {"kind": "captioner", "provider": "rule_based", "version": "1"}
    assert not report.failed


# ---------------------------------------------------------------- by models behind an API

SAID = {"caption": "Warm piano over soft drums. It grows.", "genre": "lofi, ambient", "has_vocals": False}


@pytest.fixture(scope="module")
def song(tmp_path_factory) -> Track:
    path = tmp_path_factory.mktemp("song") / "a.wav"
    soundfile.write(path, np.stack([tone(440)[:RATE], tone(220)[:RATE]], axis=1), RATE)
    return Track(id="a.wav", path=path)


@pytest.fixture(params=KEYS)
def api(request, configure, monkeypatch, tmp_path):
    """(server, provider, what the service's answer looks like), the provider from the shipped YAML."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEYS[request.param], services.SECRET)
    cfg = configure("annotate", "tempo_key=none", f"captioner={request.param}", "captioner.service.timeout=1")
    with services.serve() as server:
        cfg.captioner.service.base_url = server.url
        yield server, instantiate(cfg.captioner), {"gemini": services.gemini, "openai": services.chat}[request.param]


def test_a_model_behind_an_api_is_asked_for_caption_and_genre(api, song):
    server, provider, answer = api
    server.answers = [(200, answer(json.dumps(SAID)))]
    assert isinstance(provider, Provider) and provider.paid
    said = provider.annotate(song)
    assert dict(said.values) == {"caption": SAID["caption"], "genre": SAID["genre"]} and not said.problems
    [(_, headers, body)] = server.requests
    assert services.SECRET in "".join(headers.values()) and services.SECRET.encode() not in body
    assert all(name in body for name in (b'"caption"', b'"genre"', b'"has_vocals"'))
    assert not re.search(rb"bpm|keyscale", body, re.IGNORECASE)
    audio = max(re.findall(rb'"data": ?"([^"]+)"', body), key=len)
    heard, _ = soundfile.read(io.BytesIO(base64.urlsafe_b64decode(audio.replace(b"+", b"-").replace(b"/", b"_"))))
    assert heard.std() > 0.01


def test_a_song_with_a_voice_but_without_lyrics_is_told(api, song):
    server, provider, answer = api
    for voice, lyrics, remark in (
        (True, "[Instrumental]", "a voice, but the song has no lyrics"),
        (False, "la la", "no voice, but the song has lyrics"),
        (True, "la la", None),
    ):
        server.answers = [(200, answer(json.dumps(SAID | {"has_vocals": voice})))]
        problems = provider.annotate(replace(song, lyrics=lyrics)).problems
        assert problems == ((f"{provider.name} hears {remark}",) if remark else ())


def test_rate_limits_are_waited_for(api, song):
    server, provider, answer = api
    server.answers = [(429, {"error": {"message": "slow down", "code": 429}}), (200, answer(json.dumps(SAID)))]
    assert provider.annotate(song).values["caption"] == SAID["caption"]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "text", ["", "I cannot listen.", '{"caption": "Warm"', '{"caption": 3, "genre": [], "x": 1}', None]
)
def test_malformed_answers_are_this_songs_error(api, song, text):
    server, provider, answer = api
    server.answers = [(200, answer(text))]
    with pytest.raises(ProviderError) as error:
        provider.annotate(song)
    assert not isinstance(error.value, ProviderDown)


def test_a_body_that_is_no_json_is_this_songs_error(api, song):
    server, provider, _ = api
    server.answers = [(200, b"<html>oops")]
    with pytest.raises(ProviderError) as error:
        provider.annotate(song)
    assert not isinstance(error.value, ProviderDown)


def test_a_service_that_does_not_answer_is_not_waited_for_for_ever(api, song):
    server, provider, answer = api
    provider.service.retries, provider.service.timeout = 0, 0.3
    server.answers = [(200, answer(json.dumps(SAID)), 0.8)]
    with pytest.raises(ProviderError, match="0.3 s"):
        provider.annotate(song)


def test_a_wrong_key_is_told_once_and_never_shown(api, song, caplog, capfd, tmp_path):
    server, provider, _ = api
    server.answers = [services.WRONG_KEY[provider.name]]
    with caplog.at_level(logging.DEBUG), pytest.raises(ProviderDown, match=KEYS[provider.name]) as error:
        provider.annotate(song)
    shown = [str(error.value), repr(error.value), repr(provider), caplog.text, *capfd.readouterr()]
    shown += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert services.SECRET not in "\n".join(shown)


def test_without_a_key_nothing_is_sent(api, song, monkeypatch):
    server, provider, _ = api
    monkeypatch.delenv(KEYS[provider.name])
    provider.service.base_url = None
    with pytest.raises(ProviderDown, match=f"{KEYS[provider.name]} is not set"):
        provider.annotate(song)
    assert not server.requests


# ---------------------------------------------------------------- ACE-Step's captioner


def test_long_prose_ends_with_a_sentence(configure, song):
    """Behind an OpenAI-compatible server, which needs no key."""
    prose = "**Style**: a warm *lofi* piece.\n\n" + "The piano plays softly over the drums. " * 60
    cfg = configure("annotate", "tempo_key=none", "captioner=acestep_captioner")
    with services.serve() as server:
        cfg.captioner.service = {
            "_target_": "acestep_lora.annotate.remote.OpenAI", "model": "acestep-captioner", "base_url": server.url
        }  # fmt: skip
        server.answers = [(200, services.chat(prose))]
        provider = instantiate(cfg.captioner)
        assert isinstance(provider, Provider) and not provider.paid
        answer = provider.annotate(song)
    assert answer.values["caption"].startswith("**Style**: a warm *lofi* piece. The piano")
    assert answer.values["caption"].endswith("over the drums.")
    assert answer.problems == ("caption shortened to fit the text encoder's 256 tokens",)
    assert b"Describe this audio in detail" in server.requests[0][2]


def test_the_captioner_runs_on_this_machine(song, tmp_path):
    omni = Omni(services.tiny_omni(tmp_path), Hardware("cpu"), max_new_tokens=24)
    provider = captions.AceStepCaptioner(omni, "Describe\n<audio>", paid=False, base=str(NANO))
    said = fields.line(omni.say("Describe\n<audio>", song.path))
    assert said and provider.annotate(song).values == {"caption": said}


@pytest.mark.parametrize("name", sorted(path.stem for path in (cli.CONF / "captioner").glob("*.yaml")))
def test_every_captioner_can_be_chosen(configure, name):
    cfg = configure("annotate", "tempo_key=none", f"captioner={name}")
    if name == "none":
        assert not cfg.captioner
    else:
        provider = instantiate(cfg.captioner)
        assert isinstance(provider, Provider) and provider.kind == "captioner" and provider.name == name
        assert "bpm" not in provider.fields and "keyscale" not in provider.fields
