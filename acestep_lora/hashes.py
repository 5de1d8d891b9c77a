"""Files written whole or not at all, and sha256 of large ones, computed once and remembered."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir

from acestep_lora.untrusted import read_object


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, moved onto `path` when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short, of one writer, and no link lies in wait there
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


SUMS = "sha256.json"
"""The file in a sealed folder that says what belongs into it."""


def seal(folder: Path) -> None:
    """Write down size and sha256 of every file in a folder, once they have reached the disk."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            sums[path.relative_to(folder).as_posix()] = [path.stat().st_size, _sha256(file)]
    write_atomic(folder / SUMS, json.dumps(sums, indent=0).encode())


def sealed(path: Path) -> Path | None:
    """The sealed folder that a file, or the folder it is in, lies in."""
    return next((folder for folder in path.absolute().parents[:2] if (folder / SUMS).is_file()), None)


def damage(path: Path) -> str | None:
    """What is wrong with a file of a sealed folder; None when it is as it was written."""
    folder = sealed(path) or path.absolute().parent
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        size, sha256 = sums[path.absolute().relative_to(folder).as_posix()]
    except (OSError, ValueError, LookupError, TypeError):
        return f"{SUMS} does not say what it should be"
    try:
        if path.stat().st_size != size:
            return f"{path.stat().st_size} bytes instead of {size}"
        with path.open("rb") as file:
            return None if _sha256(file) == sha256 else "its content has changed"
    except OSError as error:
        return error.strerror


def _sha256(file) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Temporary files of processes that were killed; for whoever has the folder to himself."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


class FileHashes:
    """Remembers digests in one JSON file. Losing or sharing that file costs time, never correctness."""

    def __init__(self, store: Path | None = None) -> None:
        self.store = store or Path(user_cache_dir("acestep-lora")) / "hashes.json"
        try:
            self.known: dict[str, list] = read_object(self.store)
        except (OSError, ValueError):
            self.known = {}  # not written yet, or unreadable: everything is hashed again

    def file(self, path: Path) -> str:
        path = Path(path).resolve()
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = self.known.get(str(path))
        if not isinstance(entry, list) or entry[:2] != stamp or len(entry) != 3 or not isinstance(entry[2], str):
            with path.open("rb") as file:
                entry = [*stamp, _sha256(file)]
            self.known[str(path)] = entry
        return entry[2]

    def files(self, paths: list[Path]) -> str:
        """One digest for several files, names and order included."""
        return digest(*[(path.name, self.file(path)) for path in sorted(paths)])

    def save(self) -> None:
        try:
            write_atomic(self.store, json.dumps(self.known).encode())
        except OSError:
            pass  # a read-only home only costs the next run the hashing


def digest(*parts: object) -> str:
    """sha256 of JSON-serialisable values, hexadecimal."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
