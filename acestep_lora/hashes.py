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
                entry = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
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
