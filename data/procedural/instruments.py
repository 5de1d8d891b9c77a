"""Instruments as tables of partials, and drums: frequency and seconds in, mono waves out."""

from dataclasses import dataclass, replace

import numpy as np

SUSTAINED = np.inf


@dataclass(frozen=True)
class Timbre:
    """An additive voice.

    Args:
        partials: (ratio to the fundamental, level, decay time in seconds or SUSTAINED).
        attack, release: seconds.
        vibrato: depth as a fraction of the frequency, at 5.3 Hz, growing in over the first 0.4 s.
        tremolo: depth of the level's swing, at 6.1 Hz.
        breath: level of noise beside the tone; with `knock`, only as it starts.
        detune: a second voice this fraction higher, which makes the sound beat.
        low, high: MIDI notes it can play.
    """

    partials: tuple[tuple[float, float, float], ...]
    attack: float = 0.004
    release: float = 0.06
    vibrato: float = 0.0
    tremolo: float = 0.0
    breath: float = 0.0
    knock: float = 0.0
    detune: float = 0.0
    low: int = 48
    high: int = 88

    @property
    def longest(self) -> float:
        """Seconds after which a struck or plucked note has died away; 6 for a sustained one."""
        decays = [decay for _, _, decay in self.partials]
        return 6.0 if SUSTAINED in decays else 4 * max(decays)

    def varied(self, rng: np.random.Generator) -> "Timbre":
        """The same instrument by another maker: brightness, decay and attack a little different."""
        tilt, decay, attack = rng.normal(0, 0.12), rng.uniform(0.8, 1.25), rng.uniform(0.8, 1.25)
        partials = tuple((ratio, level * max(ratio, 0.5) ** tilt, time * decay) for ratio, level, time in self.partials)
        return replace(self, partials=partials, attack=self.attack * attack)


def harmonics(count: int, level, decay=lambda h: SUSTAINED, stiffness: float = 0.0) -> tuple:
    """Partials 1..count with level(h) and decay(h); stiffness stretches them as a piano string's."""
    numbers = range(1, count + 1)
    return tuple((h * np.sqrt(1 + stiffness * h * h), float(level(h)), float(decay(h))) for h in numbers)


def _resonance(h: int, centre: float, width: float) -> float:
    return float(np.exp(-(((h - centre) / width) ** 2)))


INSTRUMENTS = {
    "piano": Timbre(
        harmonics(12, lambda h: h**-1.3, lambda h: 1.5 / (1 + 0.3 * h), 5e-4), attack=0.003, release=0.12, knock=0.1
    ),
    "guitar": Timbre(
        harmonics(14, lambda h: abs(np.sin(np.pi * 0.18 * h)) / h**0.9, lambda h: 0.75 / (1 + 0.12 * h**1.3)),
        attack=0.002,
        knock=0.15,
        high=80,
    ),
    "organ": Timbre(
        tuple((ratio, level, SUSTAINED) for ratio, level in
              ((0.5, 0.5), (1, 1), (1.5, 0.35), (2, 0.7), (3, 0.4), (4, 0.35), (6, 0.15), (8, 0.2))),
        attack=0.012, release=0.03, tremolo=0.15,
    ),
    "strings": Timbre(
        harmonics(18, lambda h: h**-1.0), attack=0.11, release=0.2, vibrato=0.006, breath=0.03, detune=0.004
    ),
    "flute": Timbre(
        ((1, 1, SUSTAINED), (2, 0.22, SUSTAINED), (3, 0.1, SUSTAINED), (4, 0.03, SUSTAINED)),
        attack=0.05, release=0.08, vibrato=0.007, tremolo=0.12, breath=0.16, low=60, high=92,
    ),
    "trumpet": Timbre(
        harmonics(12, lambda h: 0.35 * h**-0.3 + _resonance(h, 4, 2.2)), attack=0.035, release=0.06, vibrato=0.004,
        low=53, high=84,
    ),
    "synth": Timbre(
        tuple((h, 1 / h, SUSTAINED) for h in range(1, 24, 2)), attack=0.002, release=0.015, detune=0.0015
    ),
    "bells": Timbre(
        ((0.5, 0.25, 0.9), (1, 1, 0.9), (2.76, 0.5, 0.45), (5.4, 0.3, 0.22), (8.93, 0.15, 0.1)),
        attack=0.002, release=0.4, low=60, high=92,
    ),
    "steel drum": Timbre(  # of the held-out style only
        ((1, 1, 0.28), (2.0, 0.8, 0.4), (3.01, 0.5, 0.22), (4.12, 0.35, 0.12), (5.08, 0.2, 0.08), (7.3, 0.1, 0.05)),
        attack=0.009, release=0.1, tremolo=0.3, detune=0.008, knock=0.3, low=55, high=86,
    ),
    "plucked bass": Timbre(
        harmonics(7, lambda h: h**-1.4, lambda h: 0.9 / (1 + 0.5 * h)), attack=0.004, low=28, high=52
    ),
    "synth bass": Timbre(harmonics(9, lambda h: h**-1.1, lambda h: 2 / h), attack=0.003, release=0.03, low=28, high=52),
}  # fmt: skip


def tone(timbre: Timbre, frequency: float, seconds: float, rate: int, rng: np.random.Generator) -> np.ndarray:
    """One note held for `seconds`, without its release, [samples] float32, about RMS 0.3 as it sounds."""
    count = int(seconds * rate)
    t = np.arange(count, dtype=np.float64) / rate
    glide = timbre.vibrato * np.sin(2 * np.pi * 5.3 * t) * np.minimum(1, t / 0.4)
    cycles = frequency * (t + np.cumsum(glide) / rate)
    wave = np.zeros(count, np.float32)
    levels = 0.0
    for ratio, level, decay in timbre.partials:
        if frequency * ratio > 0.47 * rate:
            continue
        levels += level**2
        for factor in (1, 1 + timbre.detune) if timbre.detune else (1,):
            phase = cycles * (ratio * factor)
            phase = (2 * np.pi * (phase - np.floor(phase))).astype(np.float32)
            voice = np.sin(phase, out=phase)
            if decay != SUSTAINED:
                voice *= np.exp(-t / decay).astype(np.float32)
            wave += np.float32(level) * voice
    wave *= np.float32(0.42 / np.sqrt(levels))
    wave *= (1 - timbre.tremolo * (0.5 + 0.5 * np.sin(2 * np.pi * 6.1 * t))).astype(np.float32)
    if timbre.breath:
        wave += np.float32(0.3 * timbre.breath) * hiss(count, rng)
    if timbre.knock:
        size = min(count, int(0.02 * rate))
        wave[:size] += np.float32(timbre.knock) * hiss(size, rng) * np.exp(-t[:size] / 0.004).astype(np.float32)
    return wave * np.minimum(1, t / timbre.attack).astype(np.float32)


def hiss(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise without its lowest octaves, [count] float32."""
    return np.diff(rng.standard_normal(count + 1, dtype=np.float32))


def _burst(rate: int, rng: np.random.Generator, seconds: float, decay: float, level: float) -> np.ndarray:
    t = np.arange(int(seconds * rate), dtype=np.float32) / rate
    return level * hiss(len(t), rng) * np.exp(-t / decay) * np.minimum(1, t / 0.001)


def _thud(rate: int, seconds: float, start: float, end: float, glide: float, decay: float, level: float) -> np.ndarray:
    """A sine falling from `start` to `end` Hz."""
    t = np.arange(int(seconds * rate)) / rate
    cycles = end * t + (start - end) * glide * (1 - np.exp(-t / glide))
    return (level * np.sin(2 * np.pi * cycles) * np.exp(-t / decay) * np.minimum(1, t / 0.002)).astype(np.float32)


def kick(rate: int, rng: np.random.Generator) -> np.ndarray:
    wave = _thud(rate, 0.35, 160, 48, 0.03, 0.11, 1.0)
    wave[: int(0.02 * rate)] += _burst(rate, rng, 0.02, 0.004, 0.4)  # the beater
    return wave


def snare(rate: int, rng: np.random.Generator) -> np.ndarray:
    wave = _burst(rate, rng, 0.25, 0.06, 0.35)
    tone = _thud(rate, 0.15, 230, 180, 0.02, 0.05, 0.5)
    wave[: len(tone)] += tone
    return wave


def hat(rate: int, rng: np.random.Generator) -> np.ndarray:
    return np.diff(_burst(rate, rng, 0.08, 0.02, 0.2))


def shaker(rate: int, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(int(0.11 * rate), dtype=np.float32) / rate
    return 0.22 * hiss(len(t), rng) * np.minimum(1, t / 0.018) * np.exp(-t / 0.03)


def clap(rate: int, rng: np.random.Generator) -> np.ndarray:
    wave = _burst(rate, rng, 0.2, 0.05, 0.35)
    for start in (0.011, 0.022):
        wave[int(start * rate) :] += _burst(rate, rng, 0.2, 0.05, 0.25)[: len(wave) - int(start * rate)]
    return wave


def tom(rate: int, rng: np.random.Generator) -> np.ndarray:
    return _thud(rate, 0.35, 180, 100, 0.05, 0.12, 0.8)


def conga(rate: int, rng: np.random.Generator) -> np.ndarray:  # of the held-out style only
    wave = _thud(rate, 0.25, 330, 290, 0.01, 0.07, 0.7)
    wave[: int(0.02 * rate)] += _burst(rate, rng, 0.02, 0.004, 0.3)
    return wave


def cowbell(rate: int, rng: np.random.Generator) -> np.ndarray:  # of the held-out style only
    t = np.arange(int(0.25 * rate)) / rate
    square = np.sign(np.sin(2 * np.pi * 563 * t)) + np.sign(np.sin(2 * np.pi * 845 * t))
    return (0.2 * square * np.exp(-t / 0.06)).astype(np.float32)


DRUMS = {
    "kick": kick,
    "snare": snare,
    "hat": hat,
    "shaker": shaker,
    "clap": clap,
    "tom": tom,
    "conga": conga,
    "cowbell": cowbell,
}
