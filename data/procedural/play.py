"""A score -> audio."""

import numpy as np

from procedural.compose import Score
from procedural.instruments import DRUMS, INSTRUMENTS, tone

LEVELS = {"lead": 0.6, "chords": 0.2, "bass": 0.5, "drums": 0.65}
FADE = 0.3  # seconds at the end


def _pan(position: float) -> np.ndarray:
    """Constant power, -1 left to 1 right -> [2]."""
    angle = (position + 1) * np.pi / 4
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def _parts(score: Score) -> dict[str, float]:
    """Instrument -> level. The lead's is the louder where one instrument plays both."""
    return {score.chord_instrument: LEVELS["chords"], score.bass: LEVELS["bass"], score.lead: LEVELS["lead"]}


class _Sampler:
    """Plays an instrument: each pitch is synthesised once, at the greatest length the score asks for."""

    def __init__(self, score: Score, name: str, rate: int, rng: np.random.Generator):
        self.timbre, self.rate, self.rng = INSTRUMENTS[name].varied(rng), rate, rng
        self.release = int(self.timbre.release * rate)
        self.longest: dict[int, float] = {}
        for note in score.notes:
            if note.instrument == name:
                self.longest[note.pitch] = max(note.length, self.longest.get(note.pitch, 0))
        self.waves: dict[int, np.ndarray] = {}

    def note(self, pitch: int, length: float) -> np.ndarray:
        if pitch not in self.waves:
            frequency = 440 * 2 ** ((pitch - 69) / 12)
            seconds = min(self.longest[pitch] + self.timbre.release, self.timbre.longest)
            self.waves[pitch] = tone(self.timbre, frequency, seconds, self.rate, self.rng)
        wave = self.waves[pitch][: int(length * self.rate) + self.release].copy()
        fade = min(self.release, len(wave))
        wave[len(wave) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
        return wave


def _add(mix: np.ndarray, wave: np.ndarray, start: int, level: float) -> None:
    wave = wave[: len(mix) - start]
    mix[start : start + len(wave)] += np.float32(level) * wave


def _room(mix: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Some reverberation, [n, 2] -> [n, 2]."""
    count = int(0.5 * rate)
    t = np.arange(count, dtype=np.float32) / rate
    tail = rng.standard_normal((count, 2), dtype=np.float32) * np.exp(-t / rng.uniform(0.06, 0.15))[:, None]
    size = 1 << int(np.ceil(np.log2(len(mix) + count)))
    wet = np.fft.irfft(np.fft.rfft(mix, size, 0) * np.fft.rfft(tail, size, 0), size, 0)[: len(mix)]
    return mix + np.float32(rng.uniform(0.02, 0.12) * mix.std() / (wet.std() + 1e-9)) * wet.astype(np.float32)


def play(score: Score, seed: int, rate: int) -> np.ndarray:
    """-> [samples, 2] float32."""
    rng = np.random.default_rng([seed, 2])
    count = int(score.duration * rate)
    pans = dict(zip(("lead", "chords", "drums"), rng.uniform(-0.4, 0.4, 3), strict=True))
    stereo = np.zeros((count, 2), np.float32)
    for name, level in _parts(score).items():
        sampler, track = _Sampler(score, name, rate, rng), np.zeros(count, np.float32)
        for note in score.notes:
            if note.instrument == name:
                _add(track, sampler.note(note.pitch, note.length), int(note.start * rate), level * note.loudness)
        place = 0.0 if name == score.bass else pans["lead" if name == score.lead else "chords"]
        stereo += track[:, None] * _pan(place)
    kit = {drum: DRUMS[drum](rate, rng) for drum in sorted({stroke.drum for stroke in score.strokes})}
    track = np.zeros(count, np.float32)
    for stroke in score.strokes:
        _add(track, kit[stroke.drum], int(stroke.start * rate), LEVELS["drums"] * stroke.loudness)
    stereo = _room(stereo + track[:, None] * _pan(pans["drums"] / 2), rate, rng)
    fade = int(FADE * rate)
    stereo[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)[:, None] ** 2
    return stereo * np.float32(rng.uniform(0.5, 0.9) / np.abs(stereo).max())
