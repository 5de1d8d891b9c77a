"""Songs as small pictures: the waveform above the mel spectrogram, in sixteen colours. And curves.

Size and memory depend on the picture, not on the song: every column is made from its own stretch of the file, and at
four bits per pixel a picture of the default size stays under 12 KB whatever it shows.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import librosa
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from acestep_lora.data.audio import Spool, spool

RATE = 16_000  # Hz, so the mel bands reach 8 kHz
WINDOW = 1024  # samples
WINDOWS = 8  # per column at most; longer columns are sampled evenly
DECIBELS = (-70.0, -5.0)  # darkest and brightest, of a window's mean power against full scale
_CLEAR, _WAVE = 0, 1  # palette entries; the others are magma's
_PALETTE = bytes(3) + bytes((224, 122, 95)) + (colormaps["magma"](np.linspace(0, 1, 14), bytes=True)[:, :3]).tobytes()


class Picture(NamedTuple):
    """A song as it looks: PNG bytes, seconds decoded, sha256 of its samples at `RATE`, what was wrong with the file."""

    png: bytes
    seconds: float
    digest: str
    problems: tuple[str, ...]


def draw(path: Path, width: int = 320, bands: int = 48) -> Picture:
    """Waveform and mel spectrogram, `width` by 2 * `bands` pixels. Raises AudioError for a file that does not decode.

    The digest is that of the sound: names, tags and lossless formats make no difference to it.
    """
    with TemporaryDirectory() as folder, spool(path, RATE, folder) as song:
        with song.file.open("rb") as samples:
            digest = hashlib.file_digest(samples, "sha256").hexdigest()
        extremes, mel = _columns(song, width, bands)
    levels = np.interp(10 * np.log10(mel + 1e-12), DECIBELS, (_WAVE + 1, 15)).round().astype(np.uint8)
    pixels = np.concatenate([_waveform(extremes, bands), np.flipud(levels.T)])
    image = Image.fromarray(pixels, mode="P")
    image.putpalette(_PALETTE)
    png = io.BytesIO()
    image.save(png, "PNG", bits=4, transparency=_CLEAR, optimize=True)
    return Picture(png.getvalue(), song.duration, digest, song.problems)


def _columns(song: Spool, width: int, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest sample [width, 2] and mean mel power [width, bands] of as many equal stretches."""
    filters = librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=bands, norm=None)
    taper = np.hanning(WINDOW).astype(np.float32)
    extremes, mel = np.zeros((width, 2), np.float32), np.zeros((width, bands), np.float32)
    for i, (start, stop) in enumerate(pairwise(np.linspace(0, song.frames, width + 1).astype(int))):
        first = max(0, min(start, song.frames - WINDOW))
        block = song.read(first, max(stop, first + WINDOW)).mean(axis=1)
        own = block[start - first : stop - first]
        extremes[i] = own.min(initial=0), own.max(initial=0)
        windows = np.lib.stride_tricks.sliding_window_view(block, WINDOW)
        windows = windows[np.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).astype(int)]
        power = np.abs(np.fft.rfft(windows * taper)) ** 2 / taper.sum() ** 2 * 4
        mel[i] = filters @ power.mean(axis=0)
    return extremes, mel


def _waveform(extremes: np.ndarray, height: int) -> np.ndarray:
    """Palette entries [height, width]: a bar from the lowest to the highest sample of each column [width, 2]."""
    low, high = (1 - extremes.clip(-1, 1).T) / 2 * (height - 1)
    rows = np.arange(height)[:, None]
    return np.where((rows >= np.floor(high)) & (rows <= np.ceil(low)), _WAVE, _CLEAR).astype(np.uint8)


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Panel:
    """Curves over one axis: label -> (x, y), both of one length. Labels in `faint` are drawn as a background."""

    title: str
    x: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    faint: Sequence[str] = ()
    marks: Mapping[str, float] = field(default_factory=dict)  # label -> x of a vertical line


def draw_curves(panels: Sequence[Panel], columns: int = 2) -> bytes:
    """A PNG of panels in rows. A label has the same colour in all of them; a curve of one point is a dot."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 3.4 * rows), layout="constrained")
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    colours = {label: f"C{i}" for i, label in enumerate(labels)}
    places = figure.subplots(rows, columns, squeeze=False).flat
    for panel, axes in zip(panels, places, strict=False):
        for label, (x, y) in panel.curves.items():
            style = {"alpha": 0.25, "linewidth": 0.8} if label in panel.faint else {"linewidth": 1.6}
            dots = "o" if len(x) < 12 else None
            axes.plot(x, y, color=colours[label], label=label, marker=dots, markersize=4, **style)
        for label, x in panel.marks.items():
            axes.axvline(x, color="grey", linestyle=":", label=label)
        axes.set(title=panel.title, xlabel=panel.x)
        axes.grid(alpha=0.2)
        if panel.curves or panel.marks:
            axes.legend(fontsize=8)
    for axes in list(places):  # those left over
        axes.set_axis_off()
    png = io.BytesIO()
    figure.savefig(png, dpi=90, format="png")
    return png.getvalue()
