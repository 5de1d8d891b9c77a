"""The key of a piece from its spectral peaks: arrays in, numbers out.

A chroma vector is matched with a profile of each of the 24 keys, as Krumhansl and Schmuckler did; the profiles are the
weights of a logistic regression, which makes the match a probability (how they were fitted: docs/log.md).
"""

from typing import NamedTuple

import numpy as np
from scipy.signal import stft

SIZE, HOP = 8192, 2048  # samples at `tempo.RATE`
LOWEST, HIGHEST = 35, 99  # MIDI pitches, 62 Hz to 2.5 kHz: basses and tunes, few overtones
QUIET = 0.05  # of the median frame; below, only reverberation and noise sound
IN_TUNE = 0.1  # coherence of the peaks with a scale of semitones: noise has 0.03, music 0.2 and more
PRESENT, FEWEST = 0.01, 5  # part of the sound that makes a pitch class present; so many of them tell a key
NAMES = {"major": "C Db D Eb E F F# G Ab A Bb B".split(), "minor": "C C# D Eb E F F# G G# A Bb B".split()}
# Weights of the chroma (roots of the parts, less those of an even sound) from the tonic upwards; of the mode itself.
PROFILES = {
    "major": ([8.9, -3.8, 1.6, -5.2, 4.6, -0.5, -2.2, 6.2, -1.5, -3.5, -5.4, 2.8], 0.0),
    "minor": ([6.9, -7.9, 3.3, 2.9, -3.5, -1.4, -2.2, 6.1, -2.2, -3.6, 0.7, -1.2], -0.1),
}


class Key(NamedTuple):
    """`name` is like "F# minor", `confidence` its probability."""

    name: str
    confidence: float


def peaks(samples: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spectral peaks from `LOWEST` to `HIGHEST`: frame, MIDI pitch (fractional) and magnitude, each [n].

    A parabola through three bins' logarithms tells place and height (Smith and Serra 1987, PARSHL).
    """
    logs = np.log(np.abs(stft(samples, nperseg=SIZE, noverlap=SIZE - HOP, boundary=None)[2]).T + 1e-12)
    left, centre, right = logs[:, :-2], logs[:, 1:-1], logs[:, 2:]
    frame, bin = np.nonzero((centre > left) & (centre >= right))
    left, centre, right = left[frame, bin], centre[frame, bin], right[frame, bin]
    shift = 0.5 * (left - right) / (left - 2 * centre + right)
    pitch = 69 + 12 * np.log2((bin + 1 + shift) * rate / SIZE / 440)
    heard = (pitch > LOWEST - 0.5) & (pitch < HIGHEST + 0.5)
    return frame[heard], pitch[heard], np.exp(centre - 0.25 * (left - right) * shift)[heard]


def chroma(samples: np.ndarray, rate: int) -> np.ndarray | None:
    """The part of each pitch class in the sound, [12] from C, sum 1, for any concert pitch; None where nothing is in
    tune.

    samples: mono, at least `SIZE`.
    """
    frame, pitch, magnitude = peaks(samples, rate)
    scale = np.sum(magnitude * np.exp(2j * np.pi * pitch))
    if not np.abs(scale) > IN_TUNE * magnitude.sum():
        return None
    table = np.zeros((1 + frame.max(), 12))
    np.add.at(table, (frame, np.rint(pitch - np.angle(scale) / (2 * np.pi)).astype(int) % 12), magnitude)
    loudness = table.sum(axis=1)
    sounding = loudness > QUIET * np.median(loudness)
    return np.mean(table[sounding] / loudness[sounding, None], axis=0)


def estimate(samples: np.ndarray, rate: int) -> Key | None:
    """The likeliest key of a mono signal; None without pitches, or with too few of them."""
    parts = chroma(samples, rate)
    if parts is None or np.sum(parts > PRESENT) < FEWEST:
        return None
    scores = {
        f"{name} {mode}": np.roll(np.sqrt(12 * parts) - 1, -tonic) @ profile + bias
        for mode, (profile, bias) in PROFILES.items()
        for tonic, name in enumerate(NAMES[mode])
    }
    best = max(scores, key=scores.get)
    return Key(best, float(1 / sum(np.exp(score - scores[best]) for score in scores.values())))
