import os
import pickle
import random
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile
import soxr

from acestep_lora.data import audio
from acestep_lora.data.audio import AudioError, probe, spool
from acestep_lora.errors import UserError

BAD = Path(__file__).parent / "bad_audio"
RATE = 48_000
OUTCOMES = {  # seconds decoded, or what the error says; then what the problem says
    "aac.m4a": (3.0, ""),
    "adts.aac": (3.0, ""),
    "corrupt_middle.mp3": (1.45, "can be read"),
    "dc_offset.flac": (3.0, "silent"),
    "flac_in_ogg.ogg": (3.0, ""),
    "head_only.flac": ("not audio", ""),
    "head_only.mp3": ("not audio", ""),
    "head_only.opus": ("not audio", ""),
    "header_only.wav": ("too short", ""),
    "ima_adpcm.wav": (1.02, ""),
    "ok.mp3": (3.0, ""),
    "ok.ogg": (3.0, ""),
    "ok.opus": (3.0, ""),
    "ok_mono_low.mp3": (3.0, ""),
    "one_sample.wav": ("too short", ""),
    "short_0_1s.wav": ("too short", ""),
    "silence.flac": (3.0, "silent"),
    "text_renamed.wav": ("not audio", ""),
    "truncated.flac": (0.94, "0.9 s of 3.0 s"),
    "truncated.mp3": (1.15, "1.2 s of 3.0 s"),
    "truncated.ogg": ("too short", ""),
    "vbr_noxing.mp3": (3.0, ""),
    "webm_opus.webm": (3.0, ""),
    "wma.wma": (2.99, ""),
    "zero_byte.flac": ("is empty", ""),
    "zero_byte.mp3": ("is empty", ""),
    "zero_byte.wav": ("is empty", ""),
}


def decode(path, rate=RATE, problems=None, **options):
    with tempfile.TemporaryDirectory() as folder, spool(path, rate, folder, **options) as song:
        if problems is not None:
            problems += song.problems
        return song.read()


def sine(frequency, seconds, rate, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


def fit(signal, frequency, rate):
    """Amplitude of one sine in a signal, by least squares, and what is left of the signal without it."""
    phase = 2 * np.pi * frequency * np.arange(len(signal)) / rate
    basis = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    weights = np.linalg.lstsq(basis, signal.astype(np.float64), rcond=None)[0]
    return np.hypot(*weights), signal - basis @ weights


@pytest.fixture
def noise():
    return (0.1 * np.random.default_rng(0).standard_normal((3 * 44_100 + 17, 2))).astype(np.float32)


@pytest.fixture
def without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)


def test_every_file_has_an_expected_outcome():
    assert {file.name for file in BAD.iterdir()} - {"README.md"} == set(OUTCOMES)


@pytest.mark.parametrize("name", OUTCOMES)
def test_odd_files(name, tmp_path):
    expected, problem = OUTCOMES[name]
    if isinstance(expected, str):
        with pytest.raises(AudioError, match=expected) as caught:
            spool(BAD / name, RATE, tmp_path)
        assert name in str(caught.value) and str(caught.value).endswith(".") and "\n" not in str(caught.value)
    else:
        with spool(BAD / name, RATE, tmp_path) as song:
            assert song.duration == pytest.approx(expected, abs=0.035)  # up to a packet of encoder delay
            assert np.isfinite(song.read()).all() and song.read().shape == (song.frames, 2)
            assert problem in "; ".join(song.problems) and bool(song.problems) == bool(problem)
    assert not list(tmp_path.iterdir())


def test_the_extension_does_not_matter(tmp_path):
    for source, name in (("ok.mp3", "a.wav"), ("ok.ogg", "b.mp3"), ("aac.m4a", "c.mp3"), ("ok.mp3", "ü 東京 🎵.raw")):
        (tmp_path / name).write_bytes((BAD / source).read_bytes())
        assert np.allclose(decode(tmp_path / name), decode(BAD / source), atol=1e-6)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_decoding_at_the_same_rate_is_exact(subtype, tmp_path, noise):
    soundfile.write(tmp_path / "a.wav", noise, RATE, subtype=subtype)
    assert np.array_equal(decode(tmp_path / "a.wav"), soundfile.read(tmp_path / "a.wav", dtype="float32")[0])


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 88_200, 192_000])
def test_blocks_equal_resampling_in_one_piece(rate, tmp_path, noise):
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    whole = soxr.resample(noise, rate, RATE, quality="HQ")
    streamed = decode(tmp_path / "a.wav")
    assert streamed.shape == whole.shape and streamed.dtype == np.float32
    assert np.abs(streamed - whole).max() < 1e-4


@pytest.mark.parametrize("frequency", [1_000, 10_000, 18_000])
def test_resampling_is_clean_at_18_khz(frequency, tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(frequency, 3, 44_100), 44_100, subtype="DOUBLE")
    signal = decode(tmp_path / "a.wav")[RATE // 2 : -RATE // 2, 0]
    amplitude, rest = fit(signal, frequency, RATE)
    assert 20 * np.log10(amplitude / np.sqrt(2) / rest.std()) > 100
    assert abs(20 * np.log10(amplitude / 0.5)) < 0.01


# Traps: nothing is lost in silence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["ok.mp3"] * 2, ["vbr_noxing.mp3", "ok.mp3"], ["ok.ogg"] * 2, ["ok.opus"] * 2])
def test_glued_songs_are_read_to_the_end(names, tmp_path):
    path = tmp_path / f"glued{Path(names[0]).suffix}"
    path.write_bytes(b"".join((BAD / name).read_bytes() for name in names))
    assert probe(path) < 3.1
    assert len(decode(path)) / RATE == pytest.approx(6.0, abs=0.06)


@pytest.mark.parametrize("kind", ["mp3", "ogg"])
def test_songs_glued_at_another_rate_keep_the_first_and_say_so(kind, tmp_path, noise):
    for rate in (44_100, RATE):
        soundfile.write(tmp_path / f"{rate}.{kind}", noise, rate)
    glued = b"".join((tmp_path / f"{rate}.{kind}").read_bytes() for rate in (44_100, RATE))
    (tmp_path / f"glued.{kind}").write_bytes(glued)
    problems = []
    assert len(decode(tmp_path / f"glued.{kind}", problems=problems)) / RATE == pytest.approx(3.0, abs=0.06)
    assert "cannot be read in" in problems[0]


def test_vbr_mp3_without_a_length_is_whole_and_the_same_music():
    whole, reference = decode(BAD / "vbr_noxing.mp3"), decode(BAD / "ok.mp3")
    lag = range(900, 1400)  # the encoder's delay, which only a Xing header tells
    scores = [np.vdot(whole[n : n + RATE], reference[:RATE]) for n in lag]
    assert max(scores) > 0.9 * np.linalg.norm(reference[:RATE]) ** 2 and len(whole) > 3 * RATE


@pytest.mark.parametrize("name", ["vbr_noxing.mp3", "aac.m4a", "wma.wma", "flac_in_ogg.ogg", "text_renamed.wav"])
def test_without_pyav_the_extra_is_named(name, without_pyav):
    with pytest.raises(AudioError, match=r'pip install "acestep-lora\[formats\]"'):
        decode(BAD / name)


@pytest.mark.parametrize("name", ["ok.mp3", "ok.ogg", "ok.opus", "corrupt_middle.mp3", "truncated.flac"])
def test_pyav_is_not_needed_for_the_rest(name, without_pyav):
    assert len(decode(BAD / name)) / RATE == pytest.approx(OUTCOMES[name][0], abs=0.01)


def test_damaged_flac_keeps_its_undamaged_start(tmp_path, noise):
    soundfile.write(tmp_path / "whole.flac", noise, RATE)
    data = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) * 3 // 4])
    problems = []
    kept = decode(tmp_path / "cut.flac", problems=problems)
    assert 0.6 * len(noise) < len(kept) < 0.8 * len(noise) and "of 2.8 s can be read" in problems[0]
    assert np.array_equal(kept, decode(tmp_path / "whole.flac")[: len(kept)])


def test_cut_and_piped_wavs_are_read_to_their_end(tmp_path, noise):
    soundfile.write(tmp_path / "a.wav", noise, RATE, subtype="PCM_16")
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    piped = bytearray(data)
    start = data.index(b"data") + 4
    piped[start : start + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "piped.wav").write_bytes(piped)
    for name, frames in (("a.wav", len(noise)), ("cut.wav", len(noise) / 2), ("piped.wav", len(noise))):
        problems = []
        assert len(decode(tmp_path / name, problems=problems)) == pytest.approx(frames, abs=20)
        assert not problems


def test_flac_without_a_length(tmp_path, noise, monkeypatch):
    soundfile.write(tmp_path / "a.flac", noise, RATE)
    whole, data = decode(tmp_path / "a.flac"), bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # STREAMINFO's 36-bit total sample count
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    assert np.allclose(decode(tmp_path / "a.flac"), whole, atol=1e-6) and probe(tmp_path / "a.flac") == 0.0
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match="does not tell its length"):
        decode(tmp_path / "a.flac")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [44_100, RATE])
def test_non_finite_samples_are_refused(value, rate, tmp_path, noise):
    noise[2 * rate, 1] = value
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"'a.wav' holds NaN or infinite samples at (1.9|2.0) s"):
        decode(tmp_path / "a.wav")


def test_max_duration_cuts_and_says_so(tmp_path):
    problems = []
    whole = decode(BAD / "ok.mp3")
    assert np.array_equal(decode(BAD / "ok.mp3", max_duration=1.5, problems=problems), whole[: 3 * RATE // 2])
    assert problems == ["is cut to its first 1.5 s by max_duration"]
    for untouched in (3.0, 100):
        assert np.array_equal(decode(BAD / "ok.mp3", max_duration=untouched, problems=problems), whole)
    assert len(problems) == 1
    with pytest.raises(AudioError, match="too short, 0.00 s"):
        decode(BAD / "ok.mp3", max_duration=0)


def test_paths_that_are_no_song(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for name in ("folder.wav", "gone.wav"):
        with pytest.raises(AudioError, match=f"'{name}' is empty or not a regular file"):
            decode(tmp_path / name)
    assert probe(tmp_path / "folder.wav") == probe(tmp_path / "gone.wav") == 0.0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_pipes_and_links_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "dangling.flac").symlink_to("nowhere.flac")
    for name in ("pipe.wav", "dangling.flac"):
        with pytest.raises(AudioError, match="not a regular file"):
            decode(tmp_path / name)


def test_playlists_open_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mp3").write_bytes((BAD / "ok.mp3").read_bytes())
    (tmp_path / "list.m4a").write_text("ffconcat version 1.0\nfile other.mp3\n", encoding="utf-8")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:3,\nother.mp3\n#EXT-X-ENDLIST\n", encoding="utf-8")
    for name in ("list.m4a", "list.m3u8"):
        with pytest.raises(AudioError, match="is not audio"):
            decode(tmp_path / name)


def test_errors_hide_terminal_codes_and_travel_between_processes(tmp_path):
    (tmp_path / "a\x1b[31m.wav").write_bytes(b"no sound")
    with pytest.raises(AudioError) as caught:
        decode(tmp_path / "a\x1b[31m.wav")
    assert "\x1b" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_absurd_sample_rates_are_refused(tmp_path, noise):
    soundfile.write(tmp_path / "a.wav", noise, 1)
    with pytest.raises(AudioError, match="claims a sample rate of 1 Hz"):
        decode(tmp_path / "a.wav")


# Channels -------------------------------------------------------------------------------------------------------------


def test_mono_is_on_both_sides(tmp_path, noise):
    soundfile.write(tmp_path / "a.wav", noise[:, 0], RATE, subtype="FLOAT")
    assert np.array_equal(decode(tmp_path / "a.wav"), noise[:, [0, 0]])


@pytest.mark.parametrize(("kind", "order"), [("wav", "LRCFlr"), ("flac", "LRCFlr"), ("ogg", "LCRlrF")])
def test_surround(kind, order, tmp_path):
    tones = dict(zip("LRCFlr", (300, 500, 700, 80, 900, 1100), strict=True))
    channels = np.stack([sine(tones[speaker], 1, RATE, 0.4) for speaker in order], axis=1)
    soundfile.write(tmp_path / f"a.{kind}", channels, RATE)
    left, right = decode(tmp_path / f"a.{kind}")[4800:-4800].T
    loud = 0.4 / (1 + 2 * np.sqrt(0.5))
    soft = loud * np.sqrt(0.5)
    expected = {"L": (loud, 0), "R": (0, loud), "C": (soft, soft), "F": (0, 0), "l": (soft, 0), "r": (0, soft)}
    for speaker, levels in expected.items():
        measured = fit(left, tones[speaker], RATE)[0], fit(right, tones[speaker], RATE)[0]
        assert measured == pytest.approx(levels, abs=0.02 if kind == "ogg" else 1e-3), speaker


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 16])
def test_other_channel_counts_are_on_both_sides(channels, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones((RATE, channels)), RATE, subtype="FLOAT")
    assert decode(tmp_path / "a.wav") == pytest.approx(1.0, abs=1e-5)


def test_loud_surround_does_not_clip(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones((RATE, 6)), RATE, subtype="FLOAT")
    assert decode(tmp_path / "a.wav") == pytest.approx(1.0, abs=1e-4)


# Spool ----------------------------------------------------------------------------------------------------------------


def test_spool_reads_slices_and_cleans_up(tmp_path):
    whole = decode(BAD / "ok.mp3", 44_100)
    with spool(BAD / "ok.mp3", 44_100, tmp_path) as song:
        assert (song.frames, song.rate, song.gain, song.problems) == (len(whole), 44_100, 1.0, ())
        assert song.duration == pytest.approx(3.0, abs=1e-4)
        for part in ((0, None), (0, 1), (1000, 5000), (song.frames - 5, song.frames + 5), (7, 7), (10, 3)):
            assert np.array_equal(song.read(*part), whole[slice(*part)])
        assert [song.file] == list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_spool_leaves_no_file_behind(error, tmp_path, monkeypatch):
    def interrupted(*_):
        yield np.zeros((10, 2), np.float32)
        raise error

    monkeypatch.setattr(audio, "_resample", interrupted)
    with pytest.raises(error):
        spool(BAD / "ok.mp3", RATE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_hot_samples_are_kept_and_told(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(440, 1, RATE, 3.0), RATE, subtype="FLOAT")
    with spool(tmp_path / "a.wav", RATE, tmp_path) as song:
        assert np.abs(song.read()).max() == pytest.approx(3.0, rel=1e-3) and "3.00 times" in song.problems[0]


@pytest.mark.parametrize("amplitude", [0.01, 0.5, 3.0])
def test_peak_normalisation(amplitude, tmp_path, noise):
    soundfile.write(tmp_path / "a.wav", amplitude * noise, 44_100, subtype="FLOAT")
    with spool(tmp_path / "a.wav", RATE, tmp_path, normalize="peak") as song:
        assert 20 * np.log10(np.abs(song.read()).max()) == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize("seconds", [0.5, 3, 61])
def test_loudness_normalisation(seconds, tmp_path):
    rng = np.random.default_rng(1)
    music = rng.uniform(-0.1, 0.1, (int(seconds * RATE), 2)) * np.linspace(0.5, 1, int(seconds * RATE))[:, None]
    music[len(music) // 3 : len(music) // 2] = 0  # what the gates are for
    soundfile.write(tmp_path / "a.wav", music, RATE, subtype="FLOAT")
    with spool(tmp_path / "a.wav", RATE, tmp_path, normalize="lufs") as song:
        measured = pyloudnorm.Meter(RATE).integrated_loudness(song.read().astype(np.float64))
        assert measured == pytest.approx(-14.0, abs=0.01) and not song.problems


def test_loudness_yields_to_the_peak(tmp_path):
    music = sine(440, 2, RATE, 0.001)
    music[RATE] = 0.5
    soundfile.write(tmp_path / "a.wav", music, RATE, subtype="FLOAT")
    with spool(tmp_path / "a.wav", RATE, tmp_path, normalize="lufs") as song:
        assert 20 * np.log10(np.abs(song.read()).max()) == pytest.approx(-1.0, abs=1e-3)
        assert "dB under -14 LUFS" in song.problems[0]


def test_silence_is_never_amplified(tmp_path):
    soundfile.write(tmp_path / "a.wav", 1e-6 * np.ones((RATE, 2)), RATE, subtype="FLOAT")
    for normalize in ("peak", "lufs"):
        with spool(tmp_path / "a.wav", RATE, tmp_path, normalize=normalize) as song:
            assert song.gain == 1 and song.problems == ("is silent",)


def test_normalisation_that_cannot_be_done_is_the_users_to_mend(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="normalize=rms"):
        spool(BAD / "ok.mp3", RATE, tmp_path, normalize="rms")
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    with pytest.raises(UserError, match=r"acestep-lora\[lufs\]"):
        spool(BAD / "ok.mp3", RATE, tmp_path, normalize="lufs")
    assert not list(tmp_path.iterdir())


def test_almost_silent_music_can_be_measured(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(20, 2, RATE, 3e-4), RATE, subtype="FLOAT")  # heard by the meter below -70
    with spool(tmp_path / "a.wav", RATE, tmp_path, normalize="lufs") as song:
        assert 1 < song.gain <= 10 ** (56 / 20)


def test_memory_does_not_grow_with_the_song(tmp_path):
    minute = (3000 * np.random.default_rng(2).standard_normal(60 * 8_000)).astype(np.int16)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 8_000, 1, "PCM_16") as sink:
        for _ in range(20):
            sink.write(minute)
    tracemalloc.start()
    with spool(tmp_path / "long.wav", 16_000, tmp_path, normalize="peak") as song:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert song.frames == pytest.approx(20 * 60 * 16_000, abs=2) and peak < 4e6


# Fuzz -----------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((0, 1, 20, 500))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    for _ in range(rng.choice((0, 4))):  # headers hold the lengths
        data[rng.randrange(min(len(data), 200))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(data[: rng.choice((len(data), rng.randrange(len(data)), rng.randrange(300)))])


@pytest.mark.parametrize("name", ["ok.mp3", "vbr_noxing.mp3", "ok.ogg", "ok.opus", "aac.m4a", "a.wav", "a.flac"])
def test_damage_gives_frames_or_one_sentence(name, tmp_path):
    if name.startswith("a."):
        soundfile.write(tmp_path / name, sine(440, 1, 22_050), 22_050)
        data = (tmp_path / name).read_bytes()
    else:
        data = (BAD / name).read_bytes()
    rng = random.Random(name)
    for attempt in range(25):
        path = tmp_path / f"{attempt}{Path(name).suffix}"
        path.write_bytes(damaged(data, rng))
        assert probe(path) >= 0
        try:
            with spool(path, RATE, tmp_path) as song:
                assert np.isfinite(song.read()).all() and song.frames >= RATE // 2
        except AudioError as error:
            assert path.name in str(error) and "\n" not in str(error)
    assert not list(tmp_path.glob("*.f32"))


@pytest.mark.parametrize("suffix", [".mp3", ".wav", ".flac", ".m4a", ".ogg"])
def test_random_bytes_give_one_sentence(suffix, tmp_path):
    rng = random.Random(suffix)
    for size in (1, 12, 300, 20_000):
        path = tmp_path / f"{size}{suffix}"
        path.write_bytes(rng.randbytes(size))
        with pytest.raises(AudioError):
            spool(path, RATE, tmp_path)
