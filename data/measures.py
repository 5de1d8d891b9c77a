"""How alike two recordings are: spectra, harmony, onsets. Audio is [2, samples] float32 in [-1, 1]."""

from functools import cache

import librosa
import numpy as np
import torch
from torch import Tensor

SIZES = (2048, 1024, 512, 256, 128)  # samples of the STFT windows
FLOOR = 3e-4  # of full scale: what lies further below does not count
SILENCE = 1e-3  # RMS of what nobody hears: -60 dB


def spectra(audio: Tensor, size: int) -> Tensor:
    """STFT of left, right, mid and side, [b, 2, n] -> complex [b, 4, bins, frames]; a full-scale sine gives 1."""
    left, right = audio[:, 0], audio[:, 1]
    channels = torch.stack([left, right, (left + right) / 2, (left - right) / 2], dim=1)
    window = torch.hann_window(size)
    spectrum = torch.stft(channels.flatten(0, 1), size, size // 4, window=window, return_complex=True)
    return spectrum.unflatten(0, channels.shape[:2]) * (2 / window.sum())


def magnitudes(spectrum: Tensor) -> Tensor:
    """Their absolute values, differentiable at 0."""
    return (spectrum.real.square() + spectrum.imag.square() + 1e-10).sqrt()


def log_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of log magnitudes (nepers)."""
    return ((a + FLOOR).log() - (b + FLOOR).log()).abs().mean()


@cache
def _filters(kind: str, rate: int, size: int) -> Tensor:
    """[64 mel bands or 12 pitch classes, bins], librosa's."""
    options = {"mel": {"n_mels": 64}, "chroma": {"tuning": 0.0}}[kind]
    return torch.from_numpy(getattr(librosa.filters, kind)(sr=rate, n_fft=size, **options))


def bands(magnitude: Tensor, rate: int) -> Tensor:
    """Power in 64 mel bands, [b, bins, frames] -> [b, 64, frames]."""
    return _filters("mel", rate, 2 * (magnitude.shape[1] - 1)) @ magnitude.square()


def harmony(magnitude: Tensor, rate: int) -> Tensor:
    """`chroma`, differentiable: [b, bins, frames] -> [b, 12, frames]."""
    power = _filters("chroma", rate, 2 * (magnitude.shape[1] - 1)) @ magnitude.square()
    return power / (power.amax(dim=1, keepdim=True) + 1e-6)


def rises(audio: Tensor, rate: int) -> Tensor:
    """How much louder mel bands become from one 20 ms to the next, in nepers, [b, n] -> [b, frames - 1].

    What librosa's onset detection follows.
    """
    spectrum = torch.stft(audio, 2048, rate // 50, window=torch.hann_window(2048), return_complex=True)
    power = bands(magnitudes(spectrum * (4 / 2048)), rate)
    return (power + FLOOR**2).log().diff(dim=-1).clamp(min=0).mean(dim=1) / 2


@torch.no_grad()
def spectral_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Multi-resolution log distance, mean over SIZES."""
    pair = [torch.from_numpy(np.ascontiguousarray(x))[None] for x in (a, b)]
    return float(np.mean([log_distance(*(magnitudes(spectra(x, size)) for x in pair)) for size in SIZES]))


@torch.no_grad()
def mean_frame_distance(audio: np.ndarray) -> float:
    """The distance of `audio` from its own average: at each frequency its mean log magnitude over time."""
    distances, batch = [], torch.from_numpy(np.ascontiguousarray(audio))[None]
    for size in SIZES:
        logs = (magnitudes(spectra(batch, size)) + FLOOR).log()
        distances.append((logs - logs.mean(-1, keepdim=True)).abs().mean())
    return float(np.mean(distances))


def chroma(audio: np.ndarray, rate: int) -> np.ndarray:
    """[12, frames], 4096-sample windows a quarter apart; every frame's largest is 1, those below SILENCE are 0."""
    mono = audio.mean(0)
    classes = librosa.feature.chroma_stft(y=mono, sr=rate, n_fft=4096, hop_length=1024, tuning=0.0)
    loud = librosa.feature.rms(y=mono, frame_length=4096, hop_length=1024)[0] >= SILENCE
    return classes * loud


def chroma_correlation(a: np.ndarray, b: np.ndarray, rate: int) -> float:
    return float(np.corrcoef(chroma(a, rate).ravel(), chroma(b, rate).ravel())[0, 1])


def onsets(audio: np.ndarray, rate: int) -> np.ndarray:
    """Seconds at which something starts, by the rise of the mel spectrum."""
    hop = 160 * rate // 16000
    return librosa.onset.onset_detect(y=audio.mean(0), sr=rate, hop_length=hop, units="time")


def f_measure(found: np.ndarray, true: np.ndarray, tolerance: float = 0.07) -> float:
    """F of matching each true time to at most one found time within `tolerance` seconds; both ascending."""
    if not len(found) or not len(true):
        return float(len(found) == len(true))
    matches = i = j = 0
    while i < len(found) and j < len(true):
        if abs(found[i] - true[j]) <= tolerance:
            matches, i, j = matches + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return 2 * matches / (len(found) + len(true))
