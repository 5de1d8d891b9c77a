"""Cached songs: one safetensors file each, found by key.

`<stem>-<audio key><text key>.safetensors` holds `latents.mean`, `latents.std` [T, C], `condition.<variant>` [L, D]
without padding and, for LM hints, `hints` [T, C]. Of a song in windows there is one `condition.<variant>@<i>` for each
different text, and the header's `windows` lists the i of every window. The two keys say what each half was made from,
so a changed caption or another base model re-encodes text only: any entry with the same audio key lends its latents.
`<stem>-<audio key>.safetensors`, latents alone, is what an interrupted run leaves to lend from.
"""

import json
import math
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from acestep_lora.data.sidecars import parse_json
from acestep_lora.data.track import Track
from acestep_lora.errors import UserError
from acestep_lora.filenames import LONGEST, legal
from acestep_lora.hashes import digest, remove_leftovers, write_atomic
from acestep_lora.locks import is_locked, locked
from acestep_lora.processes import is_first
from acestep_lora.untrusted import is_plain, read_pt, told

_KEY = 16  # hex digits of each key in a file name; the header has them whole


class CacheError(UserError):
    """A cache entry or an upstream tensor file that cannot be used."""


def cannot_write(folder: Path, error: OSError) -> CacheError:
    return CacheError(f"Cannot write to {folder} ({error}): choose dataset.cache_dir=..., or make room there.")


@dataclass(frozen=True)
class Entry:
    """One cached song. Tensors are read from disk when asked for, and only the bytes asked for, or kept in memory."""

    path: Path
    header: dict[str, str]
    names: frozenset[str]
    tensors: dict[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def __reduce__(self):
        return Entry, (self.path, self.header, self.names)  # a spawned worker reads for itself

    @property
    def duration(self) -> float:
        """Seconds of decoded audio behind the latents."""
        return float(self.header["duration"])

    @property
    def frames(self) -> int:
        return int(self.header["frames"])

    @contextmanager
    def reader(self) -> Iterator[Callable[..., Tensor]]:
        """`read(name, start=0, stop=None)` -> rows of a tensor [n, d]; the file is opened once for all of them.

        Raises CacheError when the file is not what it was.
        """
        if self.tensors is not None:
            yield lambda name, start=0, stop=None: self.tensors[name][start:stop]
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                if any(header.get(key) != self.header.get(key) for key in ("audio_key", "text_key", "frames")):
                    raise CacheError(f"{self.path} was replaced by another song's entry: start again.")
                yield lambda name, start=0, stop=None: file.get_slice(name)[start:stop]
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{self.path} is gone or damaged ({error}): start again, it will be made anew.") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        with self.reader() as read:
            return read(name, start, stop)

    def in_memory(self) -> "Entry":
        with self.reader() as read:
            return replace(self, tensors={name: read(name) for name in self.names})

    @staticmethod
    def open(path: Path) -> "Entry | None":
        """The entry at `path`, or None when there is none or it is not whole."""
        try:
            with safe_open(path, framework="pt") as file:
                header, names = file.metadata() or {}, frozenset(file.keys())
                shapes = {name: file.get_slice(name).get_shape() for name in names}
            entry = Entry(path, header, names)
            return entry if "audio_key" in header and entry._fits(shapes) else None
        except (OSError, SafetensorError, LookupError, ValueError):
            return None

    def _fits(self, shapes: dict[str, list[int]]) -> bool:
        """Whether header and tensors belong together."""
        frames, mean = self.frames, shapes["latents.mean"]
        states = [shape for name, shape in shapes.items() if name.startswith("condition.")]
        windows = {f"condition.caption@{i}" for i in parse_json(self.header.get("windows", "[]"))}
        return (
            mean == shapes["latents.std"] == shapes.get("hints", mean)
            and len(mean) == 2
            and mean[0] == frames > 0
            and math.isfinite(self.duration)
            and all(len(shape) == 2 and shape[0] > 0 for shape in states)
            and windows <= shapes.keys()
        )


def audio_key(file_hash: str, vae_hash: str, settings: dict) -> str:
    return digest("audio-1", file_hash, vae_hash, settings)


def text_key(texts: list, condition_hash: str, dtype: torch.dtype, timbre_token: bool) -> str:
    return digest("text-1", texts, condition_hash, str(dtype), timbre_token)


class Cache:
    """The entries of one dataset in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lenders: dict[str, list[Path]] | None = None

    def path(self, track: Track, audio: str, text: str = "") -> Path:
        """Where an entry lies: the song's name, as much as fits, is for people; the keys make it unique."""
        keys = f"-{audio[:_KEY]}{text[:_KEY]}.safetensors"
        room = LONGEST - len(str(self.folder.absolute())) - 1 - 2 * _KEY - len("-.safetensors")
        return self.folder / f"{legal(track.path.stem.replace('.', '_'), min(120, max(8, room)))}{keys}"

    def create(self) -> None:
        """Make the folder. Raises CacheError where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One process, or the first of several that are one run, at a time; others wait. What killed ones left goes."""
        self.create()
        if not is_first():
            yield
            return
        with locked(self.folder / ".lock", f"{self.folder} is being filled by another process.", wait=True):
            remove_leftovers(self.folder)
            for spool in self.folder.glob("*.f32"):
                spool.unlink(missing_ok=True)
            self.forget()
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep others from removing entries (`prune`); without effect where nothing can be written."""
        path = self.folder / f".in-use-{uuid.uuid4().hex}.lock"
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(locked(path, f"{path} is in use."))
            yield
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def find(self, track: Track, audio: str, text: str) -> Entry | None:
        """The complete entry, if both keys match."""
        entry = Entry.open(self.path(track, audio, text))
        matches = entry and entry.header["audio_key"] == audio and entry.header.get("text_key") == text
        return entry if matches else None

    def lender(self, audio: str) -> Entry | None:
        """Any entry that holds the latents of this audio, whatever its name and text."""
        for path in self._index().get(audio[:_KEY], []):
            entry = Entry.open(path)
            if entry and entry.header["audio_key"] == audio:
                return entry
        return None

    def forget(self) -> None:
        """Look at the folder again: other processes write to it, too."""
        self._lenders = None

    def _index(self) -> dict[str, list[Path]]:
        if self._lenders is None:
            self._lenders = {}
            for path in sorted(self.folder.glob("*.safetensors")):
                self._lenders.setdefault(path.stem.rpartition("-")[2][:_KEY], []).append(path)
        return self._lenders

    def write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Entry:
        """Write an entry under a temporary name, then move it into place: a file with a final name is always whole."""
        try:
            write_atomic(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header))
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        if self._lenders is not None:
            self._lenders.setdefault(header["audio_key"][:_KEY], []).append(path)
        return Entry(path, header, frozenset(tensors))

    def prune(self, wanted: set[Path]) -> list[Path]:
        """Remove every entry that is not wanted, and what interrupted writes left behind.

        Raises CacheError while a training reads from here.
        """
        for path in self.folder.glob(".in-use-*.lock"):
            if is_locked(path):
                raise CacheError(f"{self.folder} is in use by a training: prune it when that has ended.")
            path.unlink(missing_ok=True)
        orphans = [path for path in self.folder.glob("*.safetensors") if path not in wanted]
        orphans += [path for pattern in (".*.tmp", ".tmp*", "*.f32") for path in self.folder.glob(pattern)]
        for path in orphans:
            path.unlink(missing_ok=True)
        self.forget()
        return orphans


def header_of(track: Track, duration: float, frames: int, audio: str, text: str = "") -> dict[str, str]:
    """The header of an entry: keys, sizes and the track under upstream's names."""
    fields = asdict(track)
    named = {
        name: fields[name] for name in ("caption", "genre", "lyrics", "bpm", "keyscale", "timesignature", "language")
    }
    named |= {"is_instrumental": track.is_instrumental, "custom_tag": track.custom_tag, "track_id": track.id}
    header = {name: value if isinstance(value, str) else json.dumps(value) for name, value in named.items()}
    header |= {"audio_path": str(track.path), "filename": track.path.name, "duration": repr(duration)}
    header |= {"frames": str(frames), "audio_key": audio}
    return header | ({"text_key": text} if text else {})


def read_upstream(path: Path, channels: int) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a .pt file of the official trainer, its condition padding cropped by mask.

    channels: of the base model's latents.

    Raises CacheError for anything else, and for files of its "lokr" mode, which show the model the answer as context.
    """
    with told(f"{path.name} is not a tensor file of the official trainer", CacheError):
        data = read_pt(path)
    needed = ("target_latents", "encoder_hidden_states", "encoder_attention_mask")
    missing = [name for name in needed if not isinstance(data, dict) or not is_plain(data.get(name))]
    if missing:
        raise CacheError(f"{path.name} is not a tensor file of the official trainer: it lacks {', '.join(missing)}.")
    metadata = data.get("metadata") if isinstance(data.get("metadata"), dict) else {}
    if metadata.get("preprocess_mode") == "lokr":
        raise CacheError(
            f"{path.name} was made for LoKr with the song itself as context: preprocess it again from audio."
        )
    latents, states, mask = data[needed[0]].float(), data[needed[1]], data[needed[2]].bool()
    if latents.ndim != 2 or latents.shape[1] != channels or not len(latents) or not latents.isfinite().all():
        raise CacheError(f"{path.name}: target_latents must be finite and [T, {channels}], got {list(latents.shape)}.")
    if states.ndim != 2 or mask.shape != states.shape[:1] or not mask.any():
        raise CacheError(f"{path.name}: mask {list(mask.shape)} does not fit condition states {list(states.shape)}.")
    if not states.is_floating_point() or not states[mask].isfinite().all():
        raise CacheError(f"{path.name}: encoder_hidden_states must be finite numbers, got {states.dtype}.")
    tensors = {
        "latents.mean": latents,
        "latents.std": torch.zeros_like(latents),  # upstream stored one posterior sample
        "condition.caption": states[mask],
    }
    return tensors, metadata
