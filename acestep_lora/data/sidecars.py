"""The files beside a song: what each of them claims about it, and which claim wins.

    {stem}.lyrics.txt, {stem}.txt, {stem}.lrc   lyrics; LRC time stamps and headers are stripped
    {stem}.txt with `key: value` lines          Side-Step's sidecar, `lyrics:` last
    {stem}.caption.txt                          caption
    {stem}.json                                 an object of fields (see below)
    *.csv                                       Key-BPM-Finder's export: File, BPM, Key, Camelot, Caption

Beside the fields, {stem}.json may hold

    "reviewed": true | ["bpm", ...]             a person has checked all or these fields
    "provenance": {"bpm": {"kind": "estimator", "provider": "...", ...}, ...}

Both speak of the value in the JSON or, where the JSON has none, of that in {stem}.lyrics.txt or {stem}.caption.txt.
A reviewed value beats every other, even an empty one; an unreviewed value whose provenance has a kind in `MACHINE`
loses to every other; further provenance keys are free. Otherwise the order is upstream's (`RANK`).
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from acestep_lora.data import fields

MAX_BYTES = 1 << 20
MACHINE = ("estimator", "transcriber", "captioner")
# From the weakest source to the strongest.
RANK = ("machine", "side-step", ".caption.txt", ".json", ".lrc", ".txt", ".lyrics.txt", ".csv", "reviewed")
_HOME = {"caption": ".caption.txt", "lyrics": ".lyrics.txt"}
_ALIASES = {
    "key": "keyscale", "scale": "keyscale", "tempo": "bpm", "genres": "genre", "repeats": "repeat",
    "signature": "timesignature", "time_signature": "timesignature", "sig": "timesignature",
    "lang": "language", "vocal_language": "language",
}  # fmt: skip

_BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Kana, or two common kanji in a row: what Western text in bytes over 0x7f practically never forms.
_JAPANESE = re.compile(rb"[\x82\x83][\x40-\xfc]|(?:[\x88-\x98][\x40-\xfc]){2}")
_STAMP = re.compile(r"[\[<]\d{1,3}:\d{1,2}(?:[.:]\d{1,3})?[\]>]")
_LRC_HEADER = re.compile(r"\s*\[(?:ar|ti|al|au|by|offset|length|re|ve|la|tool|#)\s*:[^\]]*\]\s*", re.IGNORECASE)
_KEY_VALUE = re.compile(r"\s*([A-Za-z_]+)\s*:(.*)")


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def strip_lrc(text: str) -> str:
    """Lyrics without LRC time stamps (`[mm:ss.xx]`, `<mm:ss.xx>`) and headers (`[ar:...]`); other tags stay."""
    lines = []
    for row in text.splitlines():
        words = _STAMP.sub("", row)
        if words != row:
            row = " ".join(words.split())
        if not _LRC_HEADER.fullmatch(row):
            lines.append(row)
    return "\n".join(lines).strip()


def _lyrics(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise ValueError(f"{fields.show(value)} is not text")
    text = strip_lrc(fields.clean(value or ""))
    return fields.INSTRUMENTAL if text.lower() == fields.INSTRUMENTAL.lower() else text or None


NORMALISE: dict[str, Callable[[object], object]] = {
    "caption": fields.caption,
    "genre": fields.caption,
    "lyrics": _lyrics,
    "bpm": fields.bpm,
    "keyscale": fields.keyscale,
    "timesignature": fields.timesignature,
    "language": fields.language,
    "is_instrumental": fields.flag,
    "custom_tag": fields.caption,
    "prompt_override": fields.prompt_override,
    "repeat": fields.repeat,
}


class Claim(NamedTuple):
    """What one source says of one field; `kind` is its rank's name in `RANK`."""

    field: str
    value: object
    source: str
    kind: str


@dataclass(frozen=True)
class Resolved:
    """Per field: the winning value in its normal form, who gave it, and what was written where that differs."""

    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    original: dict[str, object] = field(default_factory=dict)
    disagreements: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_text(path: Path, limit: int = MAX_BYTES) -> tuple[str, str | None]:
    """A text file and, when its encoding had to be guessed, a remark on that.

    Raises ValueError if the file is over `limit` bytes or not text.
    """
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"larger than {limit >> 20} MB, not read: is it the right file?")
    marked = next((encoding for mark, encoding in _BOMS.items() if raw.startswith(mark)), None)
    if marked is None and b"\0" in raw:
        raise ValueError("holds NUL bytes, not read: save it as UTF-8 text")
    guesses = ["cp932"] * bool(_JAPANESE.search(raw)) + ["cp1252", "latin-1"]
    for encoding in [marked] if marked else ["utf-8", *guesses]:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        return text, f"not UTF-8, read as {encoding}: check it or save it as UTF-8" if encoding in guesses else None
    raise ValueError(f"is marked as {marked} but is not: save it as UTF-8 text")


def parse_json(text: str) -> object:
    """JSON as the standard has it; NaN, Infinity and broken or bottomless documents raise ValueError with the line."""

    def refuse(literal: str) -> None:
        raise ValueError(f"holds {literal}, which is not JSON: use null")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON, line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def canonical(record: Mapping) -> dict[str, object]:
    """The fields of a record under their own names, case and aliases resolved; unknown keys are left out."""
    named = {}
    for key, value in record.items():
        key = str(key).strip().lower()
        named[_ALIASES.get(key, key)] = value
    return {name: named[name] for name in NORMALISE if name in named}


def side_step(text: str) -> dict[str, object] | None:
    """The fields of a Side-Step sidecar, or None if the first line is no known `key: value`.

    Lyrics are what follows `lyrics:`, or else the first line of another shape.
    """
    record: dict[str, object] = {}
    rows = text.strip().splitlines()
    for index, row in enumerate(rows):
        match = _KEY_VALUE.fullmatch(row)
        if index == 0 and not (match and canonical({match[1]: ""})):
            return None
        if match and match[1].lower() == "lyrics":
            return canonical(record | {"lyrics": "\n".join([match[2], *rows[index + 1 :]])})
        if not match and row.strip():
            return canonical(record | {"lyrics": "\n".join(rows[index:])})
        if match:
            record[match[1]] = match[2]
    return canonical(record)


def _parse(suffix: str, text: str) -> tuple[str, dict[str, object]]:
    """The rank's name and the raw record of one sidecar."""
    if suffix == ".json":
        record = parse_json(text)
        if not isinstance(record, dict):
            raise ValueError(f'holds {fields.show(record)}, an object such as {{"bpm": 120}} is expected')
        return suffix, record
    if suffix == ".txt" and (record := side_step(text)) is not None:
        return "side-step", record
    return suffix, {"caption" if suffix == ".caption.txt" else "lyrics": text}


def read_claims(stem: str, files: Mapping[str, Path]) -> tuple[list[Claim], list[str]]:
    """Claims and problems of a song's own sidecars; `files` maps NFC names to the files of the song's folder."""
    claims, problems, record = [], [], {}
    for suffix in (".caption.txt", ".lyrics.txt", ".txt", ".lrc", ".json"):
        path = files.get(nfc(stem + suffix))
        if path is None:
            continue
        try:
            text, remark = read_text(path)
            kind, values = _parse(suffix, text)
        except (OSError, ValueError) as error:
            problems.append(f"{path.name}: {error}")
            continue
        problems += [f"{path.name}: {remark}"] if remark else []
        claims += [Claim(name, value, path.name, kind) for name, value in canonical(values).items()]
        record = values if kind == ".json" else record
    try:
        claims = _checked(claims, record)
    except ValueError as error:
        problems.append(f"{nfc(stem)}.json: {error}")
    return claims, problems


def _checked(claims: list[Claim], record: Mapping) -> list[Claim]:
    """The claims, with new ranks for those that the JSON's `reviewed` and `provenance` speak of.

    Raises ValueError if one of the two has another shape.
    """
    reviewed, provenance = record.get("reviewed") or [], record.get("provenance") or {}
    reviewed = list(NORMALISE) if reviewed is True else reviewed
    if not isinstance(reviewed, list):
        raise ValueError(f"reviewed {fields.show(reviewed)} is neither true nor a list of fields")
    if not isinstance(provenance, dict) or not all(isinstance(entry, dict) for entry in provenance.values()):
        raise ValueError(f"provenance {fields.show(provenance)} is not an object of objects")
    by_machine = [name for name, entry in provenance.items() if entry.get("kind") in MACHINE]
    in_json = {claim.field for claim in claims if claim.kind == ".json"}

    def kind(claim: Claim) -> str:
        if claim.kind != (".json" if claim.field in in_json else _HOME.get(claim.field)):
            return claim.kind
        return "reviewed" if claim.field in reviewed else "machine" if claim.field in by_machine else claim.kind

    return [claim._replace(kind=kind(claim)) for claim in claims]


def read_csv(path: Path) -> tuple[dict[str, tuple[int, dict[str, object]]], list[str]]:
    """Rows of a Key-BPM-Finder table as {`file_key` of the File cell: (line, fields)}, and problems.

    The Camelot column serves where Key is empty. Raises ValueError if there is no File column.
    """
    text, remark = read_text(path, limit=16 * MAX_BYTES)
    text = fields.clean(text)
    rows, problems = {}, [remark] if remark else []
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    try:
        columns = [column.strip().lower() for column in next(reader, [])]
        for cells in reader:
            if any(cell.strip() for cell in cells[len(columns) :]):
                problems.append(f"line {reader.line_num}: {len(cells)} cells for {len(columns)} columns, not read")
                continue
            row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
            values = {"bpm": row.get("bpm"), "caption": row.get("caption")}
            values["keyscale"] = row.get("key") or row.get("camelot")
            if row.get("file"):
                rows[file_key(row["file"])] = (reader.line_num, values)
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}; not read from there on")
    if "file" not in columns:
        raise ValueError("has no File column, not read")
    return rows, problems


def file_key(name: str) -> str:
    """A file name or relative path as tables are matched by: NFC, case-folded, forward slashes."""
    return nfc(nfc(name).replace("\\", "/").removeprefix("./").casefold())


def resolve(claims: list[Claim]) -> Resolved:
    """The best-ranked valid claim of every field; of equals the later one."""

    def told(claim: Claim, value: object) -> str:
        return claim.source if claim.field in ("caption", "lyrics", "genre") else f"{claim.source} ({value})"

    found = Resolved()
    for name, normalise in NORMALISE.items():
        valid = []
        for claim in (claim for claim in claims if claim.field == name):
            try:
                value = normalise(claim.value)
            except ValueError as error:
                found.problems.append(f"{claim.source}: {name} {error}")
                continue
            if value is not None or claim.kind == "reviewed":
                valid.append((RANK.index(claim.kind), value, claim))
        if not valid:
            continue
        valid.sort(key=lambda entry: entry[0])
        _, value, winner = valid[-1]
        found.values[name], found.sources[name] = value, winner.source
        if str(winner.value).strip() != str(value):
            found.original[name] = winner.value
        if losers := [told(claim, lost) for _, lost, claim in valid[:-1] if lost != value]:
            found.disagreements.append(f"{name}: {told(winner, value)} wins over {', '.join(losers)}")
    return found
