import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_lora.annotate import key, tempo
from acestep_lora.annotate.provider import Provider, ProviderError
from acestep_lora.annotate.tempo_key import HIGH, TempoKey, agrees, alternatives, estimate
from acestep_lora.data import fields
from acestep_lora.data.track import Track

HERE = Path(__file__).parent
RATE = tempo.RATE
SONGS = {  # BPM, key, time signature, as tests/music was rendered
    "lift_voice.ogg": (76, "Ab major", "6"),
    "aloha_isle.ogg": (88, "A major", "4"),
    "jeanie_light.ogg": (116, "F major", "4"),
}
# Time signature: beats to a bar, then beats at which drum, clap and rattle sound.
PATTERNS = {
    "4": (4, (0, 2), (1, 3), np.arange(8) / 2),
    "3": (3, (0,), (), (0, 1, 2)),
    "6": (2, (0,), (1,), np.arange(6) / 3),
}
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.standard_normal(30 * RATE) * 0.2


def annotate(path):
    return TempoKey().annotate(Track(path.name, path))


def add(signal, start, sound):
    place = signal[round(start * RATE) :][: len(sound)]
    place += sound[: len(place)]


def burst(noise, decay):
    """A stroke: a fifth of a second of noise that decays by e in `decay` seconds."""
    t = np.arange(RATE // 5) / RATE
    return noise[: len(t)] / np.abs(noise[: len(t)]).max() * np.exp(-t / decay)


DRUM, CLAP, RATTLE = burst(np.cumsum(NOISE), 0.12), burst(NOISE, 0.06), burst(np.diff(NOISE), 0.02)


def drums(bpm, signature, seconds=24):
    signal = np.zeros(seconds * RATE)
    length, *voices = PATTERNS[signature]
    for bar in range(int(seconds * bpm / 60 / length) + 1):
        for beats, voice, loudness in zip(voices, (DRUM, CLAP, RATTLE), (1, 0.5, 0.2), strict=True):
            for beat in beats:
                add(signal, (bar * length + beat) * 60 / bpm, loudness * voice)
    return 0.3 * signal


def chords(tonic, mode, tuning=440.0, seconds=20):
    """I IV V I, or i iv V i, a second each, of organ tones above a bass."""
    third, t = (4 if mode == "major" else 3), np.arange(RATE) / RATE
    bars = [(0, third), (5, third), (7, 4), (0, third)]
    tones = [[root - 12, root, root + middle, root + 7] for root, middle in bars]
    second = [
        sum(
            np.sin(2 * np.pi * h * tuning * 2 ** ((tonic + p - 9) / 12) * t) / h**2 for p in chord for h in (1, 2, 3)
        ) * np.exp(-t)
        for chord in tones
    ]  # fmt: skip
    return 0.05 * np.concatenate([second[n % 4] for n in range(seconds)])


@pytest.mark.parametrize("bpm", [71.3, 79.5, 88, 96.4, 104, 117.7, 125])
@pytest.mark.parametrize("signature", PATTERNS)
def test_tempo_and_metre_of_drums(signature, bpm):
    heard = tempo.estimate(drums(bpm, signature))
    assert heard.bpm == pytest.approx(bpm, rel=0.005)
    assert heard.metre == signature


@pytest.mark.parametrize("bpm", [60, 90.5, 133.3, 185])
def test_clicks_are_beats_or_half_of_them(bpm):
    signal = np.zeros(20 * RATE)
    for n in range(int(20 * bpm / 60)):
        add(signal, n * 60 / bpm, CLAP)
    heard = tempo.estimate(signal).bpm
    assert any(heard == pytest.approx(other, rel=0.005) for other in (bpm, bpm / 2, bpm * 2))


@pytest.mark.parametrize("mode", ["major", "minor"])
@pytest.mark.parametrize("tonic", range(12))
def test_key_of_a_cadence(tonic, mode):
    heard = key.estimate(chords(tonic, mode), RATE)
    assert heard.name == f"{key.NAMES[mode][tonic]} {mode}"
    assert fields.keyscale(heard.name) == heard.name


@settings(max_examples=8, deadline=None)
@given(tuning=st.floats(428.5, 452.5), tonic=st.integers(0, 11))
def test_key_does_not_depend_on_concert_pitch(tuning, tonic):
    assert key.estimate(chords(tonic, "major", tuning), RATE).name == f"{key.NAMES['major'][tonic]} major"


def test_transposed_sound_has_a_rolled_chroma():
    low, high = key.chroma(chords(2, "minor"), RATE), key.chroma(chords(5, "minor"), RATE)
    assert np.allclose(np.roll(low, 3), high, atol=0.02)
    assert low.sum() == pytest.approx(1)


@settings(max_examples=8, deadline=None)
@given(gain=st.floats(0.02, 2), channels=st.sampled_from([(1,), (1, 1), (1, -1), (0.5, 1)]))
def test_loudness_and_channels_change_nothing(gain, channels):
    signal = drums(100, "4", 8) + chords(7, "major", seconds=8)
    expected = estimate(signal)
    assert set(expected.values) == {"bpm", "keyscale", "timesignature"}
    assert estimate(np.outer(signal, channels) * gain).values == expected.values


SWEEP = np.sin(2 * np.pi * np.cumsum(np.geomspace(100, 2000, 10 * RATE)) / RATE)
NOTHING = {
    "empty": np.zeros(0),
    "one sample": np.ones(1),
    "silence": np.zeros(5 * RATE),
    "DC": np.full(5 * RATE, 0.5),
    "dither": RANDOM.integers(-1, 2, 5 * RATE) / 2**17,
    "under 2 s": drums(120, "4", 2)[:-1],
    "white noise": NOISE,
    "blue noise": np.diff(NOISE),
    "brown noise": np.cumsum(NOISE) - np.linspace(0, NOISE.sum(), len(NOISE)),
    "short noise": NOISE[: 3 * RATE],
}


@pytest.mark.parametrize("signal", NOTHING.values(), ids=NOTHING)
def test_nothing_is_made_up(signal):
    answer = estimate(signal.astype(np.float32))
    assert answer.values == {} and answer.confidence == {}


def test_each_answer_stands_alone():
    assert set(estimate(drums(110, "4")).values) == {"bpm", "timesignature"}  # drums have no key
    assert "keyscale" not in estimate(SWEEP).values
    assert "keyscale" not in estimate(np.sin(np.arange(5 * RATE) / 10)).values  # a single note


def test_short_music_is_never_sure():
    for seconds in (3, 8, 15):
        assert max(estimate(drums(120, "4", seconds)).confidence.values()) <= seconds / 20 < HIGH


@pytest.mark.parametrize("name", SONGS)
def test_songs(name):
    bpm, keyscale, signature = SONGS[name]
    answer = annotate(HERE / "music" / name)
    assert agrees("bpm", answer.values["bpm"], bpm)
    assert answer.values["bpm"] in (bpm, *alternatives(bpm))
    assert (answer.values["keyscale"], answer.values["timesignature"]) == (keyscale, signature)
    assert all(0 <= answer.confidence[field] <= 1 for field in answer.values)


def test_only_the_middle_of_a_long_song_is_heard(tmp_path):
    """Five minutes, of which the middle two are in another tempo and key."""
    intro = drums(150, "3", 90) + np.tile(chords(1, "minor"), 5)[: 90 * RATE]
    middle = drums(100, "4", 120) + np.tile(chords(7, "major"), 6)
    soundfile.write(tmp_path / "long.flac", np.concatenate([intro, middle, intro]), RATE)
    annotate(HERE / "music/lift_voice.ogg")  # imports
    tracemalloc.start()
    values = annotate(tmp_path / "long.flac").values
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values == {"bpm": 100, "keyscale": "G major", "timesignature": "4"}
    assert peak < 600 << 20


@pytest.mark.parametrize("path", sorted((HERE / "bad_audio").glob("*.*")), ids=lambda path: path.name)
def test_bad_audio(path):
    """Either an answer of normal forms or one sentence."""
    try:
        answer = annotate(path)
    except ProviderError as error:
        assert path.name in str(error) and str(error).endswith(".")
    else:
        assert all(getattr(fields, field)(value) == value for field, value in answer.values.items())


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ProviderError, match="gone.wav"):
        annotate(tmp_path / "gone.wav")


@pytest.mark.parametrize(
    "field, estimated, annotated, expected",
    [
        ("bpm", 120, 124, True),
        ("bpm", 120, 126, False),
        ("bpm", 60, 121, True),
        ("bpm", 174, 87, True),
        ("bpm", 90, 120, False),
        ("keyscale", "Db major", "C# major", True),
        ("keyscale", "A minor", "C major", True),
        ("keyscale", "Cb major", "B major", True),
        ("keyscale", "G# minor", "Ab minor", True),
        ("keyscale", "C major", "C minor", False),
        ("keyscale", "C major", "G major", False),
        ("timesignature", "4", "2", True),
        ("timesignature", "4", "4", True),
        ("timesignature", "3", "6", False),
    ],
)
def test_agrees(field, estimated, annotated, expected):
    assert agrees(field, estimated, annotated) is expected
    assert agrees(field, annotated, estimated) is expected


@given(st.integers(30, 300))
def test_alternatives_can_be_written(bpm):
    others = alternatives(bpm)
    assert others and all(fields.bpm(other) == other and agrees("bpm", other, bpm) for other in others)


def test_configured(configure):
    provider = instantiate(configure("annotate", "tempo_key=estimate").tempo_key)
    assert isinstance(provider, Provider) and provider == TempoKey()
    assert not configure("annotate", "tempo_key=none").tempo_key
