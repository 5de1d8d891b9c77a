"""How far apart two sets of clips are: the Fréchet distance between Gaussians of their log-mel statistics.

As the Fréchet audio distance (Kilgour et al. 2019, arXiv:1812.08466), but on what anyone can compute anywhere: levels
of mel bands in place of a network's embedding. `frechet` takes any features, so embeddings of a network do as well.
"""

from collections.abc import Iterable
from typing import NamedTuple

import librosa
import numpy as np
from sklearn.covariance import ledoit_wolf

BANDS = 32
FRAME = 0.064  # seconds of a spectrum; they overlap by half
WINDOW = 1.0  # seconds that give one row of features
FLOOR = -60.0  # dB against a full-scale sine: what lies deeper, music hides


class Gaussian(NamedTuple):
    """mean [d] and covariance [d, d], float64."""

    mean: np.ndarray
    covariance: np.ndarray


def log_mel(audio: np.ndarray, rate: int) -> np.ndarray:
    """Levels of `BANDS` mel bands up to half the rate, [frames, BANDS] in dB; a full-scale sine is about 0.

    audio: [n] or [channels, n] in [-1, 1]; rate: in Hz, such as the VAE's `sampling_rate`. Only sets of one rate can
    be compared.
    """
    signal = np.atleast_2d(audio).mean(axis=0)
    size = round(FRAME * rate)
    signal = np.pad(signal, (0, max(0, size - len(signal))))
    mel = librosa.feature.melspectrogram(
        y=signal, sr=rate, n_fft=size, hop_length=size // 2, n_mels=BANDS, norm=None, center=False
    )
    power = mel * (2 / (size / 2)) ** 2  # the periodic Hann window sums to half its length
    return np.maximum(FLOOR, 10 * np.log10(np.maximum(power.T, 1e-20)))


def features(audio: np.ndarray, rate: int) -> np.ndarray:
    """Mean and standard deviation of every band in each second, [windows, 2 * BANDS] in dB: timbre, and its movement.

    A rest of less than a second is left out, unless it is all there is.
    """
    levels = log_mel(audio, rate)
    length = max(1, round(WINDOW * rate / (round(FRAME * rate) // 2)))
    count = max(1, len(levels) // length)
    windows = np.stack(np.array_split(levels[: count * length], count))
    return np.concatenate([windows.mean(axis=1), windows.std(axis=1)], axis=1)


def fit(rows: np.ndarray) -> Gaussian:
    """The Gaussian of features [n, d], its covariance shrunk towards a multiple of the identity.

    The amount is Ledoit and Wolf's (2004, doi:10.1016/S0047-259X(03)00096-4), which goes to none with many rows. It
    keeps a few clips from looking flat in the directions they happen not to show. Raises ValueError for fewer than two
    rows or for values that are not finite.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"a distribution needs at least two rows of features, got an array of shape {rows.shape}.")
    return Gaussian(rows.mean(axis=0), ledoit_wolf(rows)[0])


def root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric positive semidefinite matrix; eigenvalues below 0 are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0 (Dowson and Landau 1982).

    The trace of that root is the sum of the singular values of C_a^(1/2) C_b^(1/2): no root of a product that rounding
    has made asymmetric, and none of its squared condition.
    """
    overlap = np.linalg.norm(root(a.covariance) @ root(b.covariance), "nuc")
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return float(max(0.0, np.sum((a.mean - b.mean) ** 2) + spread))


def describe(clips: Iterable[np.ndarray], rate: int) -> Gaussian:
    """The Gaussian of the log-mel statistics of clips, each [n] or [channels, n], by all their seconds."""
    return fit(np.concatenate([features(clip, rate) for clip in clips]))
