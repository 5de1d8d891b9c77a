"""What annotate and the studio write beside a song.

    {stem}.json          every field, "reviewed", "provenance" and "checks", in one file: it is whole or absent
    {stem}.lyrics.json   {"language": "ja", "lines": [{"start": 1.2, "end": 3.4, "text": "..."}]}, times in seconds;
                         written before the JSON that counts on it; tags are lines, too, and an end may be null
    {stem}.lyrics.txt    only by `annotate.py structure=...`, which puts tags into the lyrics that are there

"reviewed" and "provenance" are those of `sidecars`; a provenance without a value says that the provider knew none.
"checks" holds what a provider said of a field whose value is a person's: {"bpm": {"value": 92, "provider": ...}}.
A file that is about to change is first copied to .acestep/backup/ in the song's folder, under a name with the digest
of its content: nothing that was ever there is lost, and equal contents are kept once.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType, MappingProxyType

from acestep_lora.annotate.provider import Line
from acestep_lora.data import sidecars
from acestep_lora.errors import UserError
from acestep_lora.filenames import own
from acestep_lora.hashes import replacing, write_atomic

BACKUP = Path(".acestep/backup")
_OBJECTS = ("provenance", "checks")
_saving = threading.Lock()  # the studio answers several requests at once


class Conflict(UserError):
    """Somebody else changed the file meanwhile."""


@dataclass(frozen=True)
class Record:
    """A song's JSON sidecar as it is on disk.

    Attributes:
        data: the whole document, keys that mean nothing here included; {} where there is no file.
        digest: sha256 of the file's bytes, None where there is no file: what `save` expects.
    """

    path: Path
    data: Mapping[str, object]
    digest: str | None

    def value(self, name: str) -> object:
        """A field in its normal form, None where it is missing or cannot be used."""
        try:
            return sidecars.NORMALISE[name](sidecars.canonical(self.data).get(name))
        except ValueError:
            return None

    def is_reviewed(self, name: str) -> bool:
        reviewed = self.data.get("reviewed") or ()
        return reviewed is True or name in reviewed

    def provenance(self, name: str) -> Mapping:
        """Of a field: kind, provider, version and confidence; {} for a person's."""
        return (self.data.get("provenance") or {}).get(name) or {}

    def check(self, name: str) -> Mapping:
        """What a provider said of a field that is a person's: value, provider, version and confidence; or {}."""
        return (self.data.get("checks") or {}).get(name) or {}


def beside(song: Path, suffix: str) -> Path:
    """A song's sidecar, existing or not. File systems spell names in NFC or NFD; the spelling on disk is kept."""
    name = song.stem + suffix
    if not (path := song.with_name(name)).exists():
        same = (entry for entry in song.parent.iterdir() if sidecars.nfc(entry.name) == sidecars.nfc(name))
        path = next(same, path)
    return path


def read(song: Path) -> Record:
    """Raises UserError for a JSON that cannot be read, because writing would lose what is in it."""
    path = beside(song, ".json")
    try:
        raw = sidecars.read_bytes(path)
        data = sidecars.parse_json(sidecars.decode(raw)[0])
        if not isinstance(data, dict):
            raise ValueError("is not an object")
        reviewed = data.get("reviewed") or []
        if reviewed is not True and not (
            isinstance(reviewed, list) and all(isinstance(name, str) for name in reviewed)
        ):
            raise ValueError("has a reviewed that is neither true nor a list of fields")
        for entries in (data.get(name) or {} for name in _OBJECTS):
            if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
                raise ValueError("has provenance or checks that are no object of objects")
    except FileNotFoundError:
        return Record(path, {}, None)
    except (ValueError, OSError) as error:
        raise UserError(f"{str(path)!r} {error}: mend it or move it away, nothing is written into it.") from error
    return Record(path, data, hashlib.sha256(raw).hexdigest())


def read_lines(song: Path) -> tuple[Line, ...]:
    """The lyrics with their times; () where there are none. Raises UserError for a file that holds something else."""
    path = beside(song, ".lyrics.json")
    if not path.is_file():
        return ()
    try:
        entries = sidecars.parse_json(sidecars.read_text(path)[0])["lines"]
        lines = [Line(entry["start"], entry.get("end"), entry["text"]) for entry in entries]
        if not all(isinstance(start + (end or 0), int | float) and isinstance(text, str) for start, end, text in lines):
            raise TypeError("a time is no number or a text no text")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{str(path)!r} holds no lines with start, end and text: mend or remove it.") from error
    return tuple(lines)


def save(
    song: Path,
    values: Mapping[str, object],
    *,
    provenance: Mapping[str, Mapping] = MappingProxyType({}),
    checks: Mapping[str, Mapping] = MappingProxyType({}),
    reviewed: Collection[str] | bool = (),
    lines: Sequence[Line] = (),
    expected: str | None | EllipsisType = ...,
) -> Record:
    """Put fields into a song's sidecar; None or "" empties one. Other keys stay as they are.

    Fields with an entry in `provenance` are a machine's, and leave alone what is reviewed. All others are a person's
    and lose their provenance; those in `reviewed` (True: all of `values`) are listed as reviewed. `lines` replace the
    times, () leaves them. `expected`: the digest that the file must still have, None for no file. Raises Conflict if
    it has another, UserError for a value that cannot be used, OSError where the folder cannot be written to.
    """
    persons = set(values) if reviewed is True else set(reviewed or ())
    with _saving:
        record = read(song)
        if expected is not ... and record.digest != expected:
            raise Conflict(f"{str(record.path)!r} was changed by somebody else: load it again, then repeat the edit.")
        settled = {name for name in provenance if record.is_reviewed(name)} - persons
        values = {name: _normal(record.path, name, value) for name, value in values.items() if name not in settled}
        data = _with_values(record.data, values, persons)
        for key, entries in (("provenance", provenance), ("checks", checks)):
            stale = values.keys() if key == "provenance" else persons
            merged = {name: entry for name, entry in (data.get(key) or {}).items() if name not in stale}
            merged |= {name: dict(entry) for name, entry in entries.items() if name not in settled}
            _put(data, key, {name: merged[name] for name in sorted(merged)})
        if persons and data.get("reviewed") is not True:
            data["reviewed"] = sorted(persons.union(data.get("reviewed") or ()))
        if lines:
            rows = [line._asdict() for line in lines]
            document = {"language": data.get("language") or "unknown", "lines": rows}
            replace(beside(song, ".lyrics.json"), _json(document))
        if data != record.data:
            replace(record.path, _json(data))
        return read(song)


def _normal(path: Path, name: str, value: object) -> object:
    try:
        return sidecars.NORMALISE[name](value)
    except KeyError:
        raise UserError(f"{name!r} is no field of a song; there are {', '.join(sidecars.NORMALISE)}.") from None
    except ValueError as error:
        raise UserError(f"{path.name}: {name} {error}.") from error


def _with_values(data: Mapping, values: Mapping[str, object], persons: Collection[str]) -> dict:
    """The document with fields set under their own names; other spellings ("tempo") go."""
    own = {key: name for key in data for name in sidecars.canonical({key: None})}
    data = {key: value for key, value in data.items() if key == own.get(key) or own.get(key) not in values}
    for name, value in values.items():
        if value is None and name not in persons:
            data.pop(name, None)
        else:
            data[name] = value  # null, too: a person has said that there is none
    return data


def _put(data: dict, key: str, entries: dict) -> None:
    if entries:
        data[key] = entries
    else:
        data.pop(key, None)


def _json(document: Mapping) -> bytes:
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    return text.encode(errors="backslashreplace")  # half a surrogate pair: as JSON escapes it


def backup(folder: Path) -> Path:
    """Where the earlier contents of a folder's sidecars are kept. Raises UserError for a link."""
    own(folder / BACKUP.parent)
    return own(folder / BACKUP)


def replace(path: Path, content: bytes) -> None:
    """Write a sidecar whole or not at all, and keep what it was."""
    if path.is_file():
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return
        keep(path)
    write_atomic(path, content)


def keep(path: Path) -> None:
    """Copy a file that is about to change to its folder's backup, of whatever size it is."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not (copy := backup(path.parent) / f"{path.stem}.{digest[:12]}{path.suffix}").exists():
        with replacing(copy) as temporary:
            shutil.copyfile(path, temporary)
