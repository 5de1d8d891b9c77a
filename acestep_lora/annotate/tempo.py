"""Tempo and metre of a piece from its onsets: arrays in, numbers out.

Onsets are correlated with themselves as in other tempo estimators (Percival and Tzanetakis 2014, doi:10.1109/TASLP.
2014.2348916), but tempo and metre are one choice. A beat may be any peak of the autocorrelation; beat and metre
together are scored by the autocorrelations at fractions and multiples of the beat. The weights are those of a logistic
model of what is notated, which makes the scores probabilities (how they were fitted: docs/log.md).

The beat is the quarter note in 2/4, 3/4 and 4/4 and the dotted quarter in 6/8.
"""

from typing import NamedTuple

import numpy as np
from scipy.fft import irfft, rfft
from scipy.ndimage import uniform_filter1d
from scipy.signal import stft

RATE = 22_050  # Hz, of the samples
SIZE, HOP = 1024, 220
FRAMES = RATE / HOP  # per second
SLOWEST, FASTEST = 40, 230  # BPM
LONGEST = 13  # seconds of autocorrelation: eight beats at the slowest
BANDS = np.geomspace(40, 10_000, 42)  # Hz: feet and tips of 40 triangles
PULSE = 0.45  # over the square root of the seconds: correlations of noise stay below
METRES = ("4", "3", "6")  # as `fields.timesignature`; 2/4 cannot be told from 4/4
# Lags in beats at which the autocorrelation is weighed.
MULTIPLES = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 2, 3, 4, 6, 8)
# A row for each of them, one for the tempo in octaves from 110 BPM and one for its square; a column for each metre.
WEIGHTS = np.array(
    [
        [-6.69, -1.96, -8.32],  # 1/6
        [3.28, 2.45, -1.57],  # 1/4
        [-0.57, -0.05, 12.10],  # 1/3
        [2.68, 3.34, -4.94],  # 1/2
        [-3.18, -6.25, -1.92],  # 2/3
        [-7.19, -4.30, -5.62],  # 3/4
        [12.29, 8.68, 5.89],  # 1
        [-5.44, -5.57, -2.96],  # 4/3
        [0.74, -6.09, -10.24],  # 3/2
        [11.35, 7.25, 12.52],  # 2
        [-2.46, 16.89, 4.80],  # 3
        [10.52, -1.78, 3.35],  # 4
        [-8.32, 6.97, -1.38],  # 6
        [6.21, -5.98, 1.62],  # 8
        [1.78, 3.19, -0.88],  # octaves from 110 BPM
        [-3.76, -4.96, -4.09],  # its square
    ]
)
BIAS = np.array([0.00, -1.36, -0.94])


class Tempo(NamedTuple):
    """`bpm` to 0.1; `metre` is one of `METRES`; confidences are probabilities."""

    bpm: float
    confidence: float
    metre: str
    metre_confidence: float


def onset_strength(samples: np.ndarray) -> np.ndarray:
    """How much louder the bands get, `FRAMES` times a second: [t], 0 where nothing begins.

    samples: mono at `RATE`, at least `SIZE`.
    """
    frequencies, _, spectra = stft(samples, RATE, nperseg=SIZE, noverlap=SIZE - HOP, boundary=None)
    rising = (frequencies - BANDS[:-2, None]) / np.diff(BANDS)[:-1, None]
    falling = (BANDS[2:, None] - frequencies) / np.diff(BANDS)[1:, None]
    energy = np.maximum(0, np.minimum(rising, falling)).astype(np.float32) @ np.abs(spectra)
    levels = np.log1p(1000 * energy / max(energy.max(), 1e-9))
    rise = np.maximum(0, levels[:, 2:] - levels[:, :-2]).mean(axis=0)
    return np.maximum(0, rise - uniform_filter1d(rise, round(FRAMES), mode="constant"))


def autocorrelation(strength: np.ndarray) -> np.ndarray:
    """Correlation coefficients by lag in frames, up to `LONGEST` or 60 % of the signal, whichever is less; empty if
    nothing changes."""
    centred = strength - strength.mean()
    count = len(centred)
    sums = irfft(np.abs(rfft(centred, 2 * count)) ** 2)[: int(min(LONGEST * FRAMES, 0.6 * count))]
    return sums / sums[0] * count / (count - np.arange(len(sums))) if sums[0] > 1e-9 else sums[:0]


def beats(correlation: np.ndarray) -> np.ndarray:
    """Lags that a beat may have, in fractional frames: peaks, moved to where their multiples correlate best, too."""
    lags = np.arange(int(60 * FRAMES / FASTEST), min(int(60 * FRAMES / SLOWEST) + 1, len(correlation) - 1))
    peaks = lags[(correlation[lags] > correlation[lags - 1]) & (correlation[lags] >= correlation[lags + 1])]
    left, centre, right = correlation[peaks - 1], correlation[peaks], correlation[peaks + 1]
    tops = peaks + 0.5 * (left - right) / (left - 2 * centre + right)
    near = tops[:, None] * np.linspace(0.995, 1.005, 61)
    return near[np.arange(len(near)), _at(correlation, near, (1, 2, 4, 8)).sum(axis=-1).argmax(axis=1)]


def features(correlation: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """What the model weighs of each beat: the correlations at `MULTIPLES` of it, and its tempo twice. [n, m + 2]"""
    octaves = np.log2(60 * FRAMES / lags / 110)
    return np.column_stack([_at(correlation, lags, MULTIPLES), octaves, octaves**2])


def _at(correlation: np.ndarray, lags: np.ndarray, multiples: tuple[float, ...]) -> np.ndarray:
    """Correlations at multiples of lags: [...] -> [..., len(multiples)]; 0 beyond the last."""
    return np.interp(lags[..., None] * np.array(multiples), np.arange(len(correlation)), correlation, right=0)


def estimate(samples: np.ndarray) -> Tempo | None:
    """The likeliest beat of a mono signal at `RATE` and its likeliest metre; None where there is no pulse."""
    correlation = autocorrelation(onset_strength(samples))
    lags = beats(correlation)
    if not len(lags) or _at(correlation, lags, (1,)).max() < PULSE / np.sqrt(len(samples) / RATE):
        return None
    scores = features(correlation, lags) @ WEIGHTS + BIAS
    odds = np.exp(scores - scores.max())
    odds /= odds.sum()
    beat = int(odds.sum(axis=1).argmax())
    metre = int(odds[beat].argmax())
    bpm = round(60 * FRAMES / float(lags[beat]), 1)
    return Tempo(bpm, float(odds[beat].sum()), METRES[metre], float(odds[:, metre].sum()))
