"""A song as stereo float32 at one sample rate, decoded in blocks: an hour of music costs disk, not memory.

* libsndfile decodes by content, whatever the file is called; PyAV (the extra `formats`) reads the rest, such as m4a.
* Nothing is lost in silence. libsndfile trusts the length it guesses at the start of an mp3 or ogg, so a VBR mp3
  without a Xing header, or two songs glued together, would end early: such files are found first and go to PyAV.
* What can be read of a damaged file is kept and the damage is told; NaN, Inf and empty files are refused.
"""

import contextlib
import io
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
import soxr

from acestep_lora.errors import UserError

BLOCK = 4096  # frames per read; a block with damage in it is lost whole
MIN_SECONDS = 0.5
SILENCE_RANGE = 3e-4
HOT_PEAK = 1.5  # decoded mp3s and resampled loud masters pass 1.0 all the time
TARGET_DB, TARGET_LUFS = -1.0, -14.0
SAMPLE_RATES = range(4_000, 768_001)  # Hz; outside, the header lies and resampling would explode
UNREAD_BYTES = 8192  # what tags and padding may leave unread at the end of a file
UNKNOWN_LENGTH = 2**62  # libsndfile's frame count is at or above it when a header leaves the length open

# Playlists (m3u8, ffconcat) would make ffmpeg open other files and addresses, so PyAV may read plain containers only.
CONTAINERS = "aac,ac3,aiff,ape,asf,avi,caf,dsf,flac,matroska,mov,mp3,mpc,mpc8,mpegts,ogg,tak,tta,w64,wav,wv"

# ITU-R BS.775 for 5.1: weights of left, right, centre, LFE and the surrounds, whose sum cannot clip. Ogg has another
# order, which libsndfile leaves as it is: left, centre, right, the surrounds, LFE.
SURROUND = np.array([[1, 0], [0, 1], [0.7071, 0.7071], [0, 0], [0.7071, 0], [0, 0.7071]], np.float32) / 2.4142
OGG_SURROUND = SURROUND[[0, 2, 1, 4, 5, 3]]


class AudioError(UserError):
    """One sentence: which file, what is wrong with it, what to do."""


class _Stream(io.BufferedReader):
    """A file in which the decoder of a damaged one may seek to any place; Python would print an error from there."""

    name = ""  # by .raw in it, soundfile would not look into the file

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with contextlib.suppress(OSError):
            super().seek(offset, whence)
        return self.tell()


@dataclass(frozen=True)
class Spool(contextlib.AbstractContextManager):
    """A decoded song in a temporary file, which the end of a `with` block removes."""

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

    def __exit__(self, *_) -> None:
        self.file.unlink(missing_ok=True)


def probe(path: str | Path) -> float:
    """Seconds as the header claims them, 0.0 when libsndfile cannot tell; only decoding tells the truth."""
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError:
        return 0.0
    return info.duration if info.frames < UNKNOWN_LENGTH else 0.0


def check_normalize(normalize: str | None) -> None:
    """Raises UserError for a normalisation that is unknown or whose library is missing."""
    if normalize not in (None, "peak", "lufs"):
        raise UserError(f"dataset.normalize={normalize} is unknown; use null, peak or lufs.")
    if normalize == "lufs" and find_spec("pyloudnorm") is None:
        raise UserError('dataset.normalize=lufs needs pyloudnorm: pip install "acestep-lora[lufs]".')


def spool(
    path: str | Path, rate: int, folder: str | Path, *, max_duration: float | None = None, normalize: str | None = None
) -> Spool:
    """Decode a song into a temporary file in `folder`, at `rate` Hz (soxr HQ), up to `max_duration` seconds.

    5.1 surround is mixed down; of any other number of channels but two, both get the mean. normalize: None, "peak" (to
    -1 dBFS) or "lufs" (ITU-R BS.1770 integrated loudness of -14 LUFS, the peak held at or below -1 dBFS; takes the song
    into memory). Raises AudioError for a song that cannot be used; no file is left then.
    """
    check_normalize(normalize)
    path, problems = Path(path), []
    limit = math.inf if max_duration is None else round(max_duration * rate)
    frames, low, high = 0, math.inf, -math.inf
    descriptor, name = tempfile.mkstemp(suffix=".f32", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            for block in _resample(path, _decode(path, problems), rate):
                kept = block[: min(len(block), limit - frames)]
                sink.write(kept.tobytes())
                frames += len(kept)
                low, high = kept.min(initial=low), kept.max(initial=high)
                if len(kept) < len(block):
                    problems.append(f"is cut to its first {max_duration:g} s by max_duration")
                    break
        if frames < MIN_SECONDS * rate:
            raise AudioError(f"{path.name!r} is too short, {frames / rate:.2f} s; remove it or find the whole song.")
        song, peak = Spool(Path(name), frames, rate, 1.0, ()), float(max(-low, high))
        if peak > HOT_PEAK:
            problems.append(f"peaks at {peak:.2f} times full scale; kept as it is unless normalised")
        if high - low < SILENCE_RANGE:
            problems.append("is silent")
        elif normalize:
            song = replace(song, gain=_gain(song, peak, normalize, problems))
        return replace(song, problems=tuple(problems))
    except BaseException:  # Ctrl-C too: an hour of music is over a gigabyte
        Path(name).unlink()
        raise


def _gain(song: Spool, peak: float, normalize: str, problems: list[str]) -> float:
    ceiling = 10 ** (TARGET_DB / 20) / peak
    if normalize == "peak":
        return ceiling
    import pyloudnorm

    loudness = max(-70.0, pyloudnorm.Meter(song.rate).integrated_loudness(song.read()))  # -70: its gate
    wanted = 10 ** ((TARGET_LUFS - loudness) / 20)
    if wanted > ceiling:
        short = 20 * math.log10(wanted / ceiling)
        problems.append(f"stays {short:.1f} dB under {TARGET_LUFS:g} LUFS so that its peaks fit")
    return min(wanted, ceiling)


def _resample(path: Path, source: Iterator[tuple[int, np.ndarray]], rate: int) -> Iterator[np.ndarray]:
    resampler, seconds = None, 0.0
    for native, block in source:
        if native not in SAMPLE_RATES:
            raise AudioError(f"{path.name!r} claims a sample rate of {native} Hz; export it at 48000 Hz.")
        if not np.isfinite(block).all():
            raise AudioError(f"{path.name!r} holds NaN or infinite samples at {seconds:.1f} s; export it again.")
        seconds += len(block) / native
        if native != rate:
            resampler = resampler or soxr.ResampleStream(native, rate, 2, dtype="float32", quality="HQ")
            block = resampler.resample_chunk(block)
        yield block
    if resampler:
        yield resampler.resample_chunk(np.zeros((0, 2), np.float32), last=True)


def _decode(path: Path, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Pairs of sample rate and stereo block [n, 2]."""
    if not path.is_file() or path.stat().st_size == 0:  # a pipe would block for ever
        raise AudioError(f"{path.name!r} is empty or not a regular file; copy it again or remove it.")
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
                    if len(sound.read(1)) and path.stat().st_size - stream.tell() > UNREAD_BYTES:
                        return "goes on after the length that libsndfile finds in it"
    except OSError as error:
        raise AudioError(f"{path.name!r} cannot be opened ({error.strerror}); check its permissions.") from error
    except soundfile.LibsndfileError:
        return "is in no format that libsndfile reads"
    return None


def _by_soundfile(path: Path, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    with _Stream(io.FileIO(path)) as stream, soundfile.SoundFile(stream) as sound:
        rate, seconds, promised = sound.samplerate, 0.0, sound.frames / sound.samplerate
        with contextlib.suppress(soundfile.LibsndfileError):  # damage: what is missing is told below
            while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
                seconds += len(block) / rate
                yield rate, _stereo(block, OGG_SURROUND if sound.format == "OGG" else SURROUND)
    if promised - seconds > 0.1:
        problems.append(f"is damaged or cut off: {seconds:.1f} s of {promised:.1f} s can be read")


def _by_pyav(path: Path, objection: str, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    try:
        import av
    except ModuleNotFoundError:
        advice = 'convert it to FLAC, or let PyAV read it: pip install "acestep-lora[formats]"'
        raise AudioError(f"{path.name!r} {objection}; {advice}.") from None
    seconds, bad = 0.0, 0
    try:
        safely = {"options": {"format_whitelist": CONTAINERS}, "metadata_errors": "ignore"}
        with _Stream(io.FileIO(path)) as stream, av.open(stream, **safely) as container:
            audio, to_float = container.streams.audio, av.AudioResampler(format="flt")
            for packet in container.demux(audio[0]) if audio else ():
                try:
                    frames = [part for frame in packet.decode() for part in to_float.resample(frame)]
                except av.InvalidDataError:
                    bad += 1
                    continue
                for frame in frames:
                    seconds += frame.samples / frame.sample_rate
                    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
                    yield frame.sample_rate, _stereo(samples, SURROUND)
    except (av.FFmpegError, ValueError) as error:  # ValueError: rate or channels change midway
        if not seconds:
            raise AudioError(f"{path.name!r} is not audio or is damaged beyond reading; replace it.") from error
        bad += 1
    if bad:
        problems.append(f"cannot be read in {bad} place{'s' * (bad > 1)}; {seconds:.1f} s are left")


def _stereo(block: np.ndarray, surround: np.ndarray) -> np.ndarray:
    """[n, channels] -> [n, 2]"""
    if block.shape[1] == 2:
        return block
    return block @ surround if block.shape[1] == 6 else block.mean(axis=1, keepdims=True).repeat(2, axis=1)


def mono(path: str | Path, rate: int) -> np.ndarray:
    """A whole song as the mean of its channels, float32 [n] at `rate` Hz. Raises AudioError."""
    with tempfile.TemporaryDirectory() as folder, spool(path, rate, folder) as song:
        return song.read().mean(axis=1)
