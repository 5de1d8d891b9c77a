"""A song as stereo float32 at one sample rate, decoded in blocks: an hour of music costs disk, not memory.

* libsndfile decodes by content, whatever the file is called; PyAV (the extra `formats`) reads the rest, such as m4a.
* Nothing is lost in silence. libsndfile trusts the length it finds or guesses at the start of an mp3 or ogg, so a VBR
  mp3 without a Xing header, or two songs glued together, would end early: such files are found first and go to PyAV.
* What can be read of a damaged file is kept and the damage is told; NaN, Inf and empty files are refused.
"""

import contextlib
import functools
import io
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr

from acestep_lora.errors import UserError

BLOCK = 4096  # frames per read; a block with damage in it is lost whole
MIN_SECONDS = 0.5
SILENCE_RMS = 1e-4
HOT_PEAK = 1.5  # decoded mp3s and resampled loud masters pass 1.0 all the time
SAMPLE_RATES = range(4_000, 768_001)  # Hz; outside, the header lies and resampling would explode
UNREAD_BYTES = 8192  # what tags and padding may leave unread at the end of a file
PIPED_BYTES = 2**31 - 2**16  # a WAV that was written to a pipe claims at least this much
UNKNOWN_LENGTH = 2**62  # libsndfile's frame count is at or above it when a header leaves the length open

# Playlists (m3u8, ffconcat) would make ffmpeg open other files and addresses, so PyAV may read plain containers only.
CONTAINERS = "aac,ac3,aiff,ape,asf,avi,caf,dsf,flac,matroska,mov,mp3,mpc,mpc8,mpegts,ogg,tak,tta,w64,wav,wv"

# Speakers by channel count: Left, Right, Centre, low-Frequency, left and right surround, back centre.
WAVE_ORDER = ("C", "LR", "LRC", "LRlr", "LRClr", "LRCFlr", "LRCFblr", "LRCFlrlr")
VORBIS_ORDER = ("C", "LR", "LCR", "LRlr", "LCRlr", "LCRlrF", "LCRlrbF", "LCRlrlrF")  # libsndfile does not reorder ogg
SPEAKERS = {"L": (1, 0), "R": (0, 1), "C": (0.7071, 0.7071), "F": (0, 0)}
SPEAKERS |= {"l": (0.7071, 0), "r": (0, 0.7071), "b": (0.5, 0.5)}


class AudioError(ValueError):
    """One sentence: which file, what is wrong with it, what to do."""


class _Stream(io.BufferedReader):
    """A file in which the decoder of a damaged one may seek to any place; Python would print an error from there."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with contextlib.suppress(OSError):
            super().seek(offset, whence)
        return self.tell()


@dataclass(frozen=True)
class Spool:
    """A decoded song in a temporary file, which `close()` or the end of a `with` block removes."""

    file: Path
    frames: int
    rate: int  # Hz
    gain: float  # linear, applied by `read`
    problems: tuple[str, ...]  # worth knowing; the song is usable all the same

    @property
    def duration(self) -> float:
        """Seconds, of the frames decoded."""
        return self.frames / self.rate

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames as a slice takes them, float32 [n, 2]."""
        start, stop, _ = slice(start, stop).indices(self.frames)
        samples = np.fromfile(self.file, np.float32, 2 * max(0, stop - start), offset=8 * start)
        return samples.reshape(-1, 2) * np.float32(self.gain)

    def close(self) -> None:
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def probe(path: str | Path) -> float:
    """Seconds as the header claims them, 0.0 when libsndfile cannot tell; only decoding tells the truth."""
    try:
        if not Path(path).is_file():
            return 0.0
        with _Stream(io.FileIO(path)) as stream, soundfile.SoundFile(stream) as sound:
            return sound.frames / sound.samplerate if sound.frames < UNKNOWN_LENGTH else 0.0
    except (OSError, TypeError, soundfile.LibsndfileError):
        return 0.0


def spool(
    path: str | Path,
    rate: int,
    folder: str | Path,
    *,
    max_duration: float | None = None,
    normalize: str | None = None,
    target_db: float = -1.0,
    target_lufs: float = -14.0,
) -> Spool:
    """Decode into a temporary file in `folder`.

    normalize: None, "peak" (to `target_db` dBFS) or "lufs" (ITU-R BS.1770 integrated loudness to `target_lufs`, the
    peak held at or below `target_db`). Raises AudioError for a song that cannot be used; no file is left then.
    """
    if normalize not in (None, "peak", "lufs"):
        raise UserError(f"normalize={normalize!r} is unknown; use null, peak or lufs.")
    path, problems = Path(path), []
    descriptor, name = tempfile.mkstemp(suffix=".f32", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            frames, peak, rms = _pour(blocks(path, rate, max_duration, problems), sink)
        if frames < MIN_SECONDS * rate:
            raise AudioError(f"{path.name!r} is too short, {frames / rate:.2f} s; remove it or find the whole song.")
        song = Spool(Path(name), frames, rate, 1.0, ())
        if peak > HOT_PEAK:
            problems.append(f"peaks at {peak:.2f} times full scale; kept as it is unless normalised")
        if rms < SILENCE_RMS:
            problems.append("is silent")
        elif normalize:
            song = replace(song, gain=_gain(song, peak, normalize, target_db, target_lufs, problems))
        return replace(song, problems=tuple(problems))
    except BaseException:  # Ctrl-C too: an hour of music is over a gigabyte
        Path(name).unlink()
        raise


def blocks(
    path: str | Path, rate: int, max_duration: float | None = None, problems: list[str] | None = None
) -> Iterator[np.ndarray]:
    """The song from its start, float32 [n, 2] at `rate` Hz (soxr HQ), in pieces of a fraction of a second.

    Mono goes to both channels. Surround is mixed down as in ITU-R BS.775 (centre and surrounds at -3 dB, no LFE) and
    scaled so that it cannot clip; of more than 8 channels both get the mean. Stops after `max_duration` seconds. What
    is worth knowing about a usable song is appended to `problems`. Raises AudioError.
    """
    if max_duration is not None and max_duration < MIN_SECONDS:
        raise UserError(f"max_duration={max_duration} is under {MIN_SECONDS} s; null keeps whole songs.")
    path, problems = Path(path), [] if problems is None else problems
    limit = math.inf if max_duration is None else round(max_duration * rate)
    frames = 0
    for block in _resample(path, _decode(path, problems), rate):
        if not np.isfinite(block).all():
            raise AudioError(f"{path.name!r} holds NaN or infinite samples at {frames / rate:.1f} s; export it again.")
        kept = block[: min(len(block), limit - frames)]
        frames += len(kept)
        if len(kept):
            yield kept
        if len(kept) < len(block):
            problems.append(f"is cut to its first {max_duration:g} s by max_duration")
            return
    if not frames:
        raise AudioError(f"{path.name!r} holds no audio; replace it or remove it.")


def _pour(source: Iterator[np.ndarray], sink) -> tuple[int, float, float]:
    """Write raw float32; frames, peak, and the RMS around the mean, as a constant offset is silence too."""
    frames, peak, total, squares = 0, 0.0, np.zeros(2), np.zeros((2, 2))
    for block in source:
        sink.write(block.tobytes())
        frames += len(block)
        peak = max(peak, float(block.max()), -float(block.min()))
        exact = block.astype(np.float64)
        total += np.ones(len(exact)) @ exact
        squares += exact.T @ exact  # a product is several times faster here than numpy's sum over an axis
    variance = squares.diagonal() / frames - np.square(total / frames)
    return frames, peak, math.sqrt(max(variance.max(), 0.0))


def _gain(song: Spool, peak: float, normalize: str, target_db: float, target_lufs: float, problems: list[str]) -> float:
    ceiling = 10 ** (target_db / 20) / peak
    if normalize == "peak":
        return ceiling
    wanted = 10 ** ((target_lufs - _loudness(song)) / 20)
    if wanted > ceiling:
        short = 20 * math.log10(wanted / ceiling)
        problems.append(f"stays {short:.1f} dB under {target_lufs:g} LUFS so that its peaks fit")
    return min(wanted, ceiling)


def _loudness(song: Spool) -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770-4), minute by minute because pyloudnorm wants a song as one array."""
    try:
        import pyloudnorm
    except ModuleNotFoundError:
        raise UserError('normalize=lufs needs pyloudnorm: pip install "acestep-lora[lufs]".') from None
    meter = pyloudnorm.Meter(song.rate)
    minute, gate, step = 60 * song.rate, round(0.4 * song.rate), round(0.1 * song.rate)
    powers = np.zeros(0)  # of the 400 ms gating blocks that start every 100 ms
    for start in range(0, song.frames - gate + 1, minute):
        meter.integrated_loudness(song.read(start, start + minute + gate - step))
        powers = np.append(powers, 10 ** (np.array(meter.blockwise_loudness) / 10))
    powers = powers[powers >= 1e-7]  # absolute gate, -70 LUFS
    powers = powers[powers > powers.mean() / 10] if len(powers) else np.array([1e-7])  # relative gate, -10 LU
    return 10 * math.log10(powers.mean())


def _resample(path: Path, source: Iterator[tuple[int, np.ndarray]], rate: int) -> Iterator[np.ndarray]:
    resampler = None
    for native, block in source:
        if native not in SAMPLE_RATES:
            raise AudioError(f"{path.name!r} claims a sample rate of {native} Hz; export it at 48000 Hz.")
        if native != rate:
            resampler = resampler or soxr.ResampleStream(native, rate, 2, dtype="float32", quality="HQ")
            block = resampler.resample_chunk(block)
        yield block
    if resampler:
        yield resampler.resample_chunk(np.zeros((0, 2), np.float32), last=True)


def _decode(path: Path, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Pairs of sample rate and stereo block [n, 2]."""
    if not path.is_file():  # a dangling link, a folder, or a pipe, which would block for ever
        raise AudioError(f"{path.name!r} is not a readable file; restore it or remove it.")
    if path.stat().st_size == 0:
        raise AudioError(f"{path.name!r} is empty; copy it again or remove it.")
    objection = _objection(path)
    yield from _by_pyav(path, objection, problems) if objection else _by_soundfile(path, problems)


def _objection(path: Path) -> str | None:
    """Why libsndfile would not deliver the whole file; None when it will, or when it will stop at damage."""
    try:
        with _Stream(io.FileIO(path)) as stream, soundfile.SoundFile(stream) as sound:
            if sound.frames >= UNKNOWN_LENGTH:
                return "does not tell its length"
            if sound.format in ("MP3", "OGG") and sound.frames > 0:
                with contextlib.suppress(soundfile.LibsndfileError):  # damage is for the decoder to report
                    sound.seek(sound.frames - 1)
                    last = sound.read(out=np.empty((1, sound.channels)))
                    if len(last) and path.stat().st_size - stream.tell() > UNREAD_BYTES:
                        return "goes on after the length that libsndfile finds in it"
    except OSError as error:
        raise AudioError(f"{path.name!r} cannot be opened ({error.strerror}); check its permissions.") from error
    except (soundfile.LibsndfileError, TypeError):  # TypeError: a name in .raw, taken for PCM without a header
        return "is in no format that libsndfile reads"
    return None


def _by_soundfile(path: Path, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    with _Stream(io.FileIO(path)) as stream, soundfile.SoundFile(stream) as sound:
        done, order = 0, VORBIS_ORDER if sound.format == "OGG" else WAVE_ORDER
        buffer = np.empty((BLOCK, sound.channels), np.float32)
        with contextlib.suppress(soundfile.LibsndfileError):  # damage: what is missing is told below
            while len(block := sound.read(out=buffer[: max(0, sound.frames - done)])):
                done += len(block)
                yield sound.samplerate, _stereo(block, order)
        _tell_loss(done / sound.samplerate, _promised(sound) / sound.samplerate, problems)


def _promised(sound: soundfile.SoundFile) -> float:
    """Frames by the header; of a WAV that is cut off libsndfile counts what is there and logs what was claimed."""
    claim = re.search(r"^data : (\d+) \(should be ([1-9]\d*)\)", sound.extra_info, re.MULTILINE)
    if claim and int(claim[1]) < PIPED_BYTES:
        return sound.frames * int(claim[1]) / int(claim[2])
    return sound.frames


def _by_pyav(path: Path, objection: str, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    try:
        import av
    except ModuleNotFoundError:
        advice = 'convert it to FLAC, or let PyAV read it: pip install "acestep-lora[formats]"'
        raise AudioError(f"{path.name!r} {objection}; {advice}.") from None
    seconds, promised, bad = 0.0, 0.0, 0
    try:
        safely = {"options": {"format_whitelist": CONTAINERS}, "metadata_errors": "ignore"}
        with _Stream(io.FileIO(path)) as stream, av.open(stream, **safely) as container:
            audio, to_float = container.streams.audio, av.AudioResampler(format="flt")
            if container.format.name.startswith(("mov", "matroska")):  # elsewhere ffmpeg guesses the length
                promised = (container.duration or 0) / av.time_base
            for packet in container.demux(audio[0]) if audio else ():
                try:
                    frames = [part for frame in packet.decode() for part in to_float.resample(frame)]
                except av.InvalidDataError:
                    bad += 1
                    continue
                for frame in frames:
                    seconds += frame.samples / frame.sample_rate
                    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
                    yield frame.sample_rate, _stereo(samples, WAVE_ORDER)
    except (av.FFmpegError, ValueError) as error:  # ValueError: rate or channels change midway
        if not seconds:
            raise AudioError(f"{path.name!r} is not audio or is damaged beyond reading; replace it.") from error
        bad += 1
    if bad:
        problems.append(f"cannot be read in {bad} place{'s' * (bad > 1)}; {seconds:.1f} s are left")
    _tell_loss(seconds, promised, problems)


def _tell_loss(seconds: float, promised: float, problems: list[str]) -> None:
    if promised - seconds > 0.1:
        problems.append(f"is damaged or cut off: {seconds:.1f} s of {promised:.1f} s can be read")


def _stereo(block: np.ndarray, order: tuple[str, ...]) -> np.ndarray:
    """[n, channels] -> [n, 2]"""
    with np.errstate(invalid="ignore", over="ignore"):  # `blocks` refuses what is not finite
        return block @ _downmix(block.shape[1], order)


@functools.cache
def _downmix(channels: int, order: tuple[str, ...]) -> np.ndarray:
    """Weights [channels, 2]; a column sums to at most 1."""
    if channels > len(order):
        return np.full((channels, 2), 1 / channels, np.float32)
    weights = np.array([SPEAKERS[speaker] for speaker in order[channels - 1]], np.float32)
    return weights / weights.sum(axis=0).max()
