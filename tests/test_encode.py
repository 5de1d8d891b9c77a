"""Songs -> cache entries: windows against the whole clip, conditions against what inference computes."""

import gc
import math
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from builders import NANO, write_songs
from diffusers import AceStepPipeline, AutoencoderOobleck
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_lora import basemodel, cli
from acestep_lora.conditioning import TEXT2MUSIC, Conditioning, hint_context, silence_context
from acestep_lora.data import encode, oobleck, passes
from acestep_lora.data.audio import Spool
from acestep_lora.data.cache import Cache
from acestep_lora.data.encode import AudioSettings, Encoder, Job, stage
from acestep_lora.data.oobleck import encode_windows, receptive_frames, streamline
from acestep_lora.data.passes import AheadLoader, SpoolDataset, TextPass
from acestep_lora.data.track import Track, scan

INFERENCE = Conditioning()
UPSTREAM = Conditioning(lyric_header=False, lyric_tokens=512, padded=True, silence_timbre=False)


@pytest.fixture(scope="module")
def make(nano, tmp_path_factory):
    """make(tracks, conditioning) -> the encoder and its jobs, all of them run."""

    def go(tracks, conditioning=INFERENCE, folder=None, dtype=torch.float32, workers=0, **audio):
        folder = folder or tmp_path_factory.mktemp("cache")
        encoder = Encoder(nano, Cache(folder), conditioning, AudioSettings(**audio), dtype)
        jobs = encoder.jobs(tracks)
        encoder.run(jobs, num_workers=workers, accelerator="cpu", devices=1)
        return encoder, jobs

    return go


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> list[Path]:
    return write_songs(tmp_path_factory.mktemp("songs"), rate=12000, count=3, seconds=1.1)


@pytest.fixture(scope="module")
def tracks(songs) -> list[Track]:
    plain, full, tagged = scan(songs[0].parent).tracks
    sung = {"lyrics": "[Verse 1]\nさくら さくら\n" * 20, "language": "ja"}
    return [
        plain,
        replace(full, caption="lofi, warm piano", bpm=92, keyscale="F# minor", timesignature="3", **sung),
        replace(tagged, caption="音楽 ünï 🎹", genre="trance", custom_tag="zzz", tag_position="append"),
    ]


@pytest.fixture(scope="module")
def pipeline() -> AceStepPipeline:
    """Inference, by diffusers alone."""
    pipeline = AceStepPipeline.from_pretrained(NANO)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fed(pipeline, track: Track, caption: str, duration: float, **options) -> dict[str, torch.Tensor]:
    """What a whole generation with these words gives the transformer.

    Starts from latents made here: for some fractions of a second diffusers draws a frame more than it has context for.
    """
    seen = {}
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        pipeline(
            track.prompt(caption),
            track.lyrics,
            audio_duration=duration,
            vocal_language=track.language,
            bpm=track.bpm,
            keyscale=track.keyscale,
            timesignature=track.timesignature,
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="latent",
            **{"latents": torch.zeros(1, math.ceil(duration * 25), 48)} | options,
        )
    finally:
        handle.remove()
    return seen


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- conditions


def test_conditions_are_what_inference_feeds(make, tracks, pipeline):
    _, jobs = make(tracks)
    for job in jobs:
        entry, track = job.entry, job.track
        assert sorted(name for name in entry.names if name.startswith("condition")) == [
            f"condition.{name}" for name in ("caption", "genre") if getattr(track, name)
        ]
        for variant in ("caption", "genre") if track.genre else ("caption",):
            seen = fed(pipeline, track, getattr(track, variant), entry.duration)
            close(entry.read(f"condition.{variant}"), seen["encoder_hidden_states"][0])
        silence = pipeline.condition_encoder.silence_latent[0]
        close(silence_context(silence, entry.frames), seen["context_latents"][0, : entry.frames], 0)


def test_hints_are_what_inference_makes_of_an_lms_codes(make, tracks, pipeline):
    """The codes of the song's own latents, as text, through the pipeline: the thinking mode of the official app."""
    _, jobs = make(tracks, Conditioning(lm_hints=0.3))
    assert any(job.entry.frames % 5 for job in jobs)  # the last code is made up with silence
    for job in jobs:
        mean = job.entry.read("latents.mean")
        silence = pipeline.condition_encoder.silence_latent
        with torch.inference_mode():
            quantized, codes = pipeline.audio_tokenizer.tokenize(mean[None], silence)
            close(job.entry.read("hints"), pipeline.audio_token_detokenizer(quantized)[0, : len(mean)])
        text = "".join(f"<|audio_code_{code}|>" for code in codes.flatten().tolist())
        options = {"audio_codes": text, "task_type": "cover", "latents": torch.zeros(1, 5 * codes.numel(), 48)}
        seen = fed(pipeline, job.track, job.track.caption, job.entry.duration, **options)
        close(hint_context(job.entry.read("hints")), seen["context_latents"][0, : len(mean)])
        close(job.entry.read("condition.caption_hint"), seen["encoder_hidden_states"][0])
        assert not torch.equal(job.entry.read("condition.caption_hint"), job.entry.read("condition.caption"))


def test_upstream_conditions_are_769_states(make, tracks, pipeline):
    """Padded text and lyrics and one timbre state, computed here as the official trainer describes it."""
    _, jobs = make(tracks[1:2], UPSTREAM)
    track, states = jobs[0].track, jobs[0].entry.read("condition.caption")
    assert states.shape == (256 + 512 + 1, 128)
    prompt = UPSTREAM.prompt(track, track.caption, TEXT2MUSIC, jobs[0].entry.duration)
    tokens = [
        pipeline.tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        for text, length in ((prompt, 256), (track.lyrics, 512))
    ]
    with torch.inference_mode():
        expected, _ = pipeline.condition_encoder(
            pipeline.text_encoder(tokens[0].input_ids).last_hidden_state,
            tokens[0].attention_mask.bool(),
            pipeline.text_encoder.get_input_embeddings()(tokens[1].input_ids),
            tokens[1].attention_mask.bool(),
            torch.zeros(1, 1, 48),
            torch.zeros(1, dtype=torch.long),
        )
    close(states, expected[0])


def test_long_lyrics_keep_their_end_of_text(make, tracks, pipeline):
    """Lyrics beyond 2048 tokens lose lines, which is told; inference would lose the end-of-text with them."""
    track = replace(tracks[0], lyrics="la la hey\n" * 2000)
    _, jobs = make([track])
    states, count = jobs[0].entry.read("condition.caption"), pipeline.tokenizer
    kept = INFERENCE.fit_lyrics(track, lambda text: len(count(text).input_ids))
    assert len(states) > 2048 and jobs[0].remarks == ["lyrics shortened to fit 2048 tokens"]
    fitting = replace(track, lyrics=kept)
    close(states, fed(pipeline, fitting, track.caption, jobs[0].entry.duration)["encoder_hidden_states"][0])


def test_conditions_are_kept_in_the_compute_dtype(make, tracks):
    _, exact = make(tracks[:1])
    _, rounded = make(tracks[:1], dtype=torch.bfloat16)
    states = [jobs[0].entry.read("condition.caption") for jobs in (exact, rounded)]
    assert [state.dtype for state in states] == [torch.float32, torch.bfloat16]
    close(states[1].float(), states[0], 0.2)
    assert torch.equal(*(jobs[0].entry.read("latents.mean") for jobs in (exact, rounded)))  # the VAE is always exact


# ---------------------------------------------------------------- long captions


@pytest.fixture(scope="module")
def text_pass(nano, tmp_path_factory) -> TextPass:
    encoder = Encoder(nano, Cache(tmp_path_factory.mktemp("c")), Conditioning(), AudioSettings(), torch.float32)
    module = TextPass(encoder, [])
    module.tokenizer = basemodel.load_text_encoder(nano, torch.float32, "cpu")[1]
    return module


words = st.text("abcdefghijklmnopqrstuvwxyz-'0123456789", min_size=1, max_size=14)
signs = st.text("音楽女性の声、しずかな夜🎹ñü", min_size=1, max_size=40)
TAIL = "# Metas\n- bpm: 92\n- timesignature: 3\n- keyscale: F# minor\n- duration: 7 seconds\n<|endoftext|>\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(words | signs, min_size=1, max_size=20), st.integers(1, 60), st.sampled_from(["", "zzz"]))
def test_whatever_the_words_the_model_reads_the_metas(text_pass, parts, times, tag):
    """The tokens that are encoded, of captions and lyrics of any length, end with tag, metas and end-of-text."""
    text = " ".join(parts * times)
    track = Track(id="a", path=Path("a"), caption=text, lyrics=text * 3, bpm=92, keyscale="F# minor", timesignature="3")
    track, job = replace(track, custom_tag=tag, tag_position="append"), Job(track)
    seen = []
    text_pass._condition = lambda prompt, lyrics: seen.append((prompt, lyrics))
    list(text_pass.conditions(job, track, 7.5))
    ((prompt, lyrics),) = seen
    read = [text_pass.tokenizer.decode(text_pass._tokens(*each)[0][0]) for each in ((prompt, 256), (lyrics, 2048))]
    assert read[0].endswith(f"{tag}\n\n{TAIL}<|endoftext|>") and read[1].endswith("<|endoftext|><|endoftext|>")
    kept = prompt.split("# Caption\n")[1].removesuffix(f"\n\n{TAIL}").removesuffix(f", {tag}" if tag else "")
    assert text.startswith(kept)
    assert ("caption shortened to fit 256 tokens" in job.remarks) == (kept != text)
    assert ("lyrics shortened to fit 2048 tokens" in job.remarks) == (track.lyrics not in lyrics)


def test_a_shortened_caption_is_told(make, tracks):
    _, jobs = make([replace(tracks[0], caption="lofi warm piano " * 100), tracks[1]])
    assert [job.remarks for job in jobs] == [["caption shortened to fit 256 tokens"], []]


# ---------------------------------------------------------------- windows


def random_vae(ratios: list[int], rate: int) -> AutoencoderOobleck:
    """A VAE of the real structure, few channels and random weights that pass signal through."""
    torch.manual_seed(0)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=ratios,
        channel_multiples=[1] * (len(ratios) - 1) + [2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=rate,
    )
    for name, parameter in vae.encoder.named_parameters():
        if name.endswith("weight_g"):
            parameter.data *= 1.25  # PyTorch's initialisation fades the signal from layer to layer
    return vae.eval().requires_grad_(False)


def same_but_fast(vae: AutoencoderOobleck) -> AutoencoderOobleck:
    copy = AutoencoderOobleck.from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    streamline(copy.encoder)
    return copy.eval().requires_grad_(False)


VAES = {"real ratios": ([2, 4, 4, 6, 10], 48000), "odd strides": ([2, 3, 5], 1500), "even": ([4, 4, 10], 8000)}


@pytest.fixture(scope="module", params=["nano", *VAES])
def vae(request, nano) -> AutoencoderOobleck:
    return random_vae(*VAES[request.param]) if request.param in VAES else basemodel.load_vae(nano, torch.float32, "cpu")


@pytest.fixture
def spooled(tmp_path):
    """spooled(samples [n, 2], rate) -> a Spool of them."""

    def make(samples: np.ndarray, rate: int) -> Spool:
        samples.astype(np.float32).tofile(tmp_path / "song.f32")
        return Spool(tmp_path / "song.f32", len(samples), rate, 1.0, ())

    return make


@torch.inference_mode()
def whole_clip(vae, samples: np.ndarray):
    posterior = vae.encode(torch.from_numpy(samples.T.astype(np.float32))[None]).latent_dist
    return posterior.mean[0].T, posterior.std[0].T


@pytest.fixture(scope="module")
def fast(vae) -> AutoencoderOobleck:
    return same_but_fast(vae)


@pytest.fixture(params=[1, 3])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("frames, rest", [(40, 0), (41, -1), (50, 0.5), (47, 0.97), (3, 0.3), (1, 0)])
def test_windows_equal_the_whole_clip(vae, fast, spooled, monkeypatch, threads, frames, rest):
    """Windows of at most 20 frames, in tiny tiles: a song shorter than one, a whole number of them, and in between."""
    hop, rate = math.prod(vae.config.downsampling_ratios), vae.config.sampling_rate
    length = frames * hop + (rest if isinstance(rest, int) else round(rest * hop))
    samples = np.random.default_rng(frames).normal(0, 0.3, (length, 2))
    monkeypatch.setitem(oobleck._TILE, "cpu", 1)  # as small as tiles get
    mean, std = encode_windows(fast, spooled(samples, rate), seconds=20 * hop / rate)
    expected = whole_clip(vae, samples)
    assert mean.shape == std.shape == expected[0].shape
    assert mean.std() > 0.03
    for actual, whole in zip((mean, std), expected, strict=True):
        close(actual, whole, 1e-5 * max(1, float(whole.abs().max())))
    assert torch.get_num_threads() == threads


def test_windows_are_bounded(fast, spooled, monkeypatch):
    """However long the song, no more than a core and two margins of it is read at once."""
    hop, rate = math.prod(fast.config.downsampling_ratios), fast.config.sampling_rate
    margin, sizes = receptive_frames(fast.config.downsampling_ratios), []
    read = Spool.read
    monkeypatch.setattr(Spool, "read", lambda self, start, stop: sizes.append(stop - start) or read(self, start, stop))
    encode_windows(fast, spooled(np.zeros((90 * hop, 2)), rate), seconds=20 * hop / rate)
    assert len(sizes) == 5
    assert max(sizes) <= (20 + 2 * margin) * hop


def test_receptive_field_is_known(vae):
    """The gradient of one frame is exactly zero beyond the margin, and not much nearer: the margin is no guess.

    Of random weights: nano's own leave most residual units silent.
    """
    vae = AutoencoderOobleck.from_config(vae.config).requires_grad_(False)
    hop, margin = math.prod(vae.config.downsampling_ratios), receptive_frames(vae.config.downsampling_ratios)
    frame = margin + 2
    with torch.inference_mode(False), torch.enable_grad():
        audio = torch.randn(1, 2, (2 * margin + 5) * hop, generator=torch.Generator().manual_seed(0)).requires_grad_()
        vae.encode(audio).latent_dist.mean[0, :, frame].square().sum().backward()
    reached = audio.grad[0].abs().sum(0).nonzero().flatten()
    first, last = int(reached.min()), int(reached.max())
    assert (frame - margin) * hop <= first <= (frame - margin + 4) * hop
    assert (frame + margin - 3) * hop <= last < (frame + margin + 1) * hop


def test_sound_beyond_the_margin_changes_nothing(vae):
    hop, margin = math.prod(vae.config.downsampling_ratios), receptive_frames(vae.config.downsampling_ratios)
    one = np.random.default_rng(0).normal(0, 0.3, ((2 * margin + 5) * hop, 2))
    other = one.copy()
    other[: 2 * hop] += 1.0
    other[-2 * hop :] -= 1.0
    (mean, std), (changed_mean, changed_std) = whole_clip(vae, one), whole_clip(vae, other)
    middle = slice(margin + 2, margin + 3)
    assert torch.equal(mean[middle], changed_mean[middle]) and torch.equal(std[middle], changed_std[middle])
    assert not torch.equal(mean[:2], changed_mean[:2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_song_is_encoded_as_decoded(make, songs, nano, workers):
    """The whole way, from a file: decoded, in windows, cached, the decoded one removed."""
    encoder, jobs = make(scan(songs[0].parent).tracks, workers=workers)
    assert {path.suffix for path in encoder.cache.folder.iterdir()} == {".safetensors", ".json"}
    vae = basemodel.load_vae(nano, torch.float32, "cpu")
    for path, job in zip(songs, jobs, strict=True):
        samples, _ = soundfile.read(path)
        mean, std = whole_clip(vae, samples)
        assert job.entry.frames == len(mean) and job.entry.duration == len(samples) / 12000
        close(job.entry.read("latents.mean"), mean)
        close(job.entry.read("latents.std"), std)


def test_the_next_song_is_decoded_while_this_one_is_encoded(make, songs, monkeypatch):
    """With the default settings, without worker processes. Each encoding waits for the decoding after it."""
    decoded, encoded = [threading.Event() for _ in songs], []
    decode, encode_song = passes.spool, passes.encode_windows

    def spool(path, *args, **kwargs):
        song = decode(path, *args, **kwargs)
        decoded[songs.index(path)].set()
        return song

    def encode_one(vae, audio):
        encoded.append(audio)
        assert all(event.wait(10) for event in decoded[: len(encoded) + 1])
        return encode_song(vae, audio)

    monkeypatch.setattr(passes, "spool", spool)
    monkeypatch.setattr(passes, "encode_windows", encode_one)
    make(scan(songs[0].parent).tracks)
    assert len(encoded) == len(songs)


def test_songs_decoded_ahead_are_removed_when_nobody_takes_them(make, songs, tmp_path, nano):
    encoder = Encoder(nano, Cache(tmp_path), INFERENCE, AudioSettings(), torch.float32)
    ahead = iter(AheadLoader(SpoolDataset(encoder, encoder.jobs(scan(songs[0].parent).tracks)), batch_size=None))
    with next(ahead)[1]:
        pass
    ahead.close()
    assert not list(tmp_path.glob("*.f32"))


def test_max_duration_is_the_duration_told(make, tracks):
    encoder, jobs = make([replace(tracks[2], duration=99.0)], max_duration=1.2)
    assert jobs[0].entry.duration == 1.2 and jobs[0].entry.frames == 30
    expected = Conditioning().key(tracks[2], 1.2)
    assert jobs[0].text_key == encode.text_key(expected, encoder.condition_hash, torch.float32, False)
    assert jobs[0].remarks == ["is cut to its first 1.2 s by max_duration"]


def test_normalised_songs_are_other_latents(make, tracks):
    _, plain = make(tracks[:1])
    _, loud = make(tracks[:1], normalize="peak")
    assert plain[0].audio_key != loud[0].audio_key
    assert not torch.equal(plain[0].entry.read("latents.mean"), loud[0].entry.read("latents.mean"))


# ---------------------------------------------------------------- jobs


def spy(monkeypatch, owner, name: str) -> list:
    """Record the calls of a function, which still does its work."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs))
    return calls


def test_copies_of_a_song_are_encoded_once(make, songs, tmp_path, monkeypatch):
    """Same stem, same words; same stem, other words; another stem: every copy gets an entry, the VAE runs once."""
    for name in ("a/song.wav", "b/song.wav", "c/song.wav", "d/other.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(songs[0].read_bytes())
    (tmp_path / "c/song.caption.txt").write_text("ambient pads", encoding="utf-8")
    runs = spy(monkeypatch, passes, "encode_windows")
    encoder, jobs = make(scan(tmp_path).tracks, folder=tmp_path / "cache")
    assert all(job.ready for job in jobs) and len(runs) == 1
    assert jobs[0].entry.path == jobs[1].entry.path != jobs[2].entry.path
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {job.entry.path.name for job in jobs} | {
        "files.json"
    }
    assert all(torch.equal(job.entry.read("latents.mean"), jobs[0].entry.read("latents.mean")) for job in jobs)


def test_bad_songs_do_not_stop_the_good(make, songs, tmp_path):
    good = [tmp_path / f"good_{i}.wav" for i in range(2)]
    for source, copy in zip(songs[:2], good, strict=True):
        copy.write_bytes(source.read_bytes())
    bad = {"text_renamed.wav", "head_only.mp3", "one_sample.wav"}
    for name in bad:
        (tmp_path / name).write_bytes((Path(__file__).parent / "bad_audio" / name).read_bytes())
    tracks = scan(tmp_path).tracks
    gone = Track(id="gone.wav", path=tmp_path / "gone.wav")
    _, jobs = make([*tracks, gone])
    ready, failed = encode.collect(jobs)
    assert [job.track.path for job in ready] == good
    reasons = {path.name: reason for path, reason in failed}
    assert reasons.keys() == bad | {"gone.wav"}
    assert all(name in reasons[name] for name in bad)
    assert reasons["gone.wav"] == "cannot be read (No such file or directory)"


def test_an_interrupted_run_continues(make, songs, tmp_path, monkeypatch):
    """Stopped in the text pass, its latents are lent to the next run, and nothing is left behind by that."""
    tracks = scan(songs[0].parent).tracks
    states = TextPass._condition

    def stop_at_third(self, prompt, lyrics):
        if len(list(tmp_path.glob("*.safetensors"))) > 4:
            raise KeyboardInterrupt
        return states(self, prompt, lyrics)

    monkeypatch.setattr(TextPass, "_condition", stop_at_third)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make(tracks, folder=tmp_path)
    monkeypatch.undo()
    assert sorted(len(path.stem.rpartition("-")[2]) for path in tmp_path.glob("*.safetensors")) == [16, 16, 16, 32, 32]
    runs = spy(monkeypatch, passes, "encode_windows")
    _, jobs = make(tracks, folder=tmp_path)
    assert all(job.ready for job in jobs) and not runs
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


# ---------------------------------------------------------------- memory


def test_models_of_two_stages_are_never_resident_together(make, tracks, monkeypatch):
    """When the text encoder is loaded, no VAE is left, and after the run neither is it."""

    def alive() -> list[str]:
        gc.collect()
        names = ("AutoencoderOobleck", "Qwen3Model", "AceStepConditionEncoder")
        return [name for name in (type(thing).__name__ for thing in gc.get_objects()) if name in names]

    before, resident = sorted(alive()), {}
    for name in ("load_vae", "load_text_encoder"):
        load = getattr(basemodel, name)

        def spied(*args, name=name, load=load):
            resident[name] = sorted(alive())
            return load(*args)

        monkeypatch.setattr(basemodel, name, spied)
    make(tracks)
    assert resident == {"load_vae": before, "load_text_encoder": before}
    assert sorted(alive()) == before


def test_a_stage_that_is_held_on_to_is_an_error():
    kept = L.LightningModule()
    with pytest.raises(RuntimeError, match="'VAE' are still in memory"):
        stage("VAE", lambda: kept, lambda module: None)


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_share_the_work(songs, tmp_path):
    for i, source in enumerate(songs * 2):
        samples, rate = soundfile.read(source)
        soundfile.write(tmp_path / f"song_{i}.wav", samples * (1 - 0.1 * i), rate)
    (tmp_path / "bad.wav").write_text("not audio", encoding="utf-8")
    options = [f"dataset.dir={tmp_path}", "hardware=cpu", "hardware.devices=2", "hardware.strategy=ddp"]
    command = [sys.executable, str(cli.ROOT / "preprocess.py"), "dataset=folder", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == cli.LEFT_OUT, done.stderr
    assert f"6 songs in {tmp_path / '.acestep'}" in done.stdout
    assert "was not encoded" not in done.stdout and "'bad.wav' is not audio" in done.stdout
    assert len(list((tmp_path / ".acestep").glob("*.safetensors"))) == 6
