"""data/procedural: endless, reproducible, and exactly what it says it is."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import measures  # noqa: E402
from procedural import HELD_OUT, STYLES, compose, describe, play, song  # noqa: E402
from procedural.compose import Note, Stroke  # noqa: E402
from procedural.instruments import INSTRUMENTS, tone  # noqa: E402
from procedural.styles import ALL, LEADS, STEPS, STEPS_PER_BEAT  # noqa: E402

RATE = 16000


def test_songs_are_audio_and_reproducible():
    for seed in range(12):
        audio, truth = song(seed)
        assert audio.dtype == np.float32 and audio.shape == (int(truth.duration * RATE), 2)
        assert np.isfinite(audio).all() and 0.49 < np.abs(audio).max() < 0.91 and audio.std() > 0.02
        again, same = song(seed)
        assert np.array_equal(audio, again) and same == truth
    assert not np.array_equal(song(0)[0][:RATE], song(1)[0][:RATE])


def test_lengths_follow_the_request():
    for seed in range(40):
        truth = describe(compose(seed, None, (9, 13)), seed)
        bar = truth.chords[0][1]
        assert 9 - bar <= truth.duration <= 13 + bar
    assert 18 < describe(compose(1, "waltz", (20, 20)), 1).duration < 22


def test_rates_play_the_same_music():
    low, high = song(5, 16000)[0], song(5, 32000)[0]
    assert abs(len(high) - 2 * len(low)) <= 1
    chroma = [measures.chroma(audio.T, rate) for audio, rate in ((low, 16000), (high[::2], 16000))]
    frames = min(c.shape[1] for c in chroma)
    assert np.corrcoef(*(c[:, :frames].ravel() for c in chroma))[0, 1] > 0.8


@pytest.mark.parametrize("style", [*STYLES, HELD_OUT])
def test_what_a_song_says_is_what_is_played(style):
    table = ALL[style]
    for seed in range(6):
        score = compose(seed, style, (9, 13))
        truth = describe(score, seed)
        assert truth.timesignature == table.metre and truth.bpm in table.bpm
        assert truth.lead in table.leads and truth.lead in truth.caption.lower() and style in truth.caption.lower()
        assert set(truth.instruments) == {note.instrument for note in score.notes}
        scale = {score.pitch(degree, 4) % 12 for degree in range(7)}
        in_key = [note.pitch % 12 in scale for note in score.notes if note.instrument != score.bass]
        assert all(in_key)
        beats = truth.chords[0][1] * truth.bpm / 60
        assert beats == pytest.approx(STEPS[table.metre] / STEPS_PER_BEAT[table.metre])
        assert truth.onsets == tuple(sorted(truth.onsets)) and truth.onsets[-1] < truth.duration - 1
        assert [start for _, start in truth.sections] == sorted(start for _, start in truth.sections)


def test_patterns_fill_their_bar():
    for style in ALL.values():
        patterns = [*style.chords, *style.bass, *style.rhythms, *(p for drums in style.drums for p in drums.values())]
        assert {len(pattern) for pattern in patterns} == {STEPS[style.metre]}
        assert all(set(pattern) <= set("Xx.") for pattern in patterns)


def test_the_held_out_style_shares_neither_lead_nor_drums():
    held = ALL[HELD_OUT]
    assert HELD_OUT not in STYLES and not set(held.leads) & set(LEADS)
    others = {drum for style in STYLES.values() for drums in style.drums for drum in drums}
    assert all(set(drums) - others >= {"conga", "cowbell"} for drums in held.drums)
    heard = {compose(seed, None, (9, 13)).style for seed in range(200)}
    assert heard == set(STYLES)


def alone(score, notes=(), strokes=()):
    return replace(score, notes=list(notes), strokes=list(strokes))


def test_a_note_sounds_when_and_where_the_score_says():
    score = compose(3, "ambient", (6, 6))
    audio = play(alone(score, [Note(score.lead, 2.0, 1.0, 69, 1.0)]), 3, RATE).T
    level = np.abs(audio).max(0)
    assert level[: int(1.99 * RATE)].max() < 1e-3 < level[int(2.0 * RATE) : int(2.2 * RATE)].max()
    spectrum = np.abs(np.fft.rfft(audio.mean(0)[2 * RATE : 3 * RATE]))
    near = max(spectrum[430:451])
    assert near > 0.5 * spectrum[200:2000].max()
    assert measures.chroma(audio, RATE).sum(1).argmax() == 9


def test_drums_sound_on_their_strokes():
    score = compose(3, "rock", (6, 6))
    strokes = [Stroke("snare", start, 1.0) for start in (0.5, 1.0, 1.75, 3.0)]
    audio = play(alone(score, strokes=strokes), 3, RATE).T
    assert measures.f_measure(measures.onsets(audio, RATE), np.array([0.5, 1.0, 1.75, 3.0])) == 1.0


def test_chroma_of_a_song_follows_its_chords():
    """The chord's notes carry more energy than the others in nearly every bar."""
    hits = []
    for seed in range(8):
        audio, truth = song(seed)
        frames = measures.chroma(audio.T, RATE)
        for start, end, classes in truth.chords:
            bar = frames[:, int(start * RATE / 1024) : int(end * RATE / 1024)].mean(1)
            hits.append(bar[list(classes)].mean() > np.delete(bar, list(classes)).mean())
    assert np.mean(hits) > 0.9


def test_instruments_are_told_apart_by_their_spectra():
    """Normalised log spectra of the same note differ more between instruments than between makers of one."""
    rng = np.random.default_rng(0)

    def spectrum(name: str) -> np.ndarray:
        wave = tone(INSTRUMENTS[name].varied(rng), 440.0, 1.0, RATE, rng)
        logs = np.log(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))[::1] + 1e-2)
        bands = logs[: 8000 // 50 * 50].reshape(-1, 50).max(1)
        return bands - bands.mean()

    makers = {name: [spectrum(name) for _ in range(3)] for name in (*LEADS, "steel drum")}
    for name, own in makers.items():
        within = max(np.abs(a - b).mean() for a in own for b in own)
        others = min(np.abs(a - b).mean() for other, theirs in makers.items() if other != name
                     for a in own for b in theirs)  # fmt: skip
        assert others > within, name


def test_it_is_fast():
    started, seconds = time.process_time(), 0.0
    for seed in range(8):
        seconds += song(seed)[1].duration
    assert seconds / (time.process_time() - started) > 30  # 170 measured; another machine may be slower


def test_measures_of_a_recording_against_itself_and_another():
    audio, other = (np.ascontiguousarray(song(seed)[0][: 6 * RATE].T) for seed in (1, 2))
    assert measures.spectral_distance(audio, audio) == 0 < measures.spectral_distance(audio, other)
    assert measures.chroma_correlation(audio, audio, RATE) == pytest.approx(1)
    assert measures.chroma_correlation(audio, other, RATE) < 0.7
    assert measures.f_measure(np.array([0.1, 0.5, 0.9]), np.array([0.15, 0.6, 0.91])) == pytest.approx(2 / 3)
    assert measures.mean_frame_distance(audio) > 0.1
