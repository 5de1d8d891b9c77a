"""The files beside a song: what each of them claims about it, and which claim wins.

    {stem}.lyrics.txt, {stem}.txt, {stem}.lrc   lyrics; LRC time stamps and headers are stripped
    {stem}.txt with `key: value` lines          Side-Step's sidecar, `lyrics:` last
    {stem}.caption.txt                          caption
    {stem}.json                                 fields, "reviewed" and "provenance"
    *.csv                                       Key-BPM-Finder's export: File, BPM, Key, Camelot, Caption

"reviewed": true | ["bpm", ...] says which fields a person has checked: they beat every other source, even if empty.
"provenance": {"bpm": {"kind": "estimator", ...}} marks fields of a kind in `MACHINE`: unreviewed, they lose to every
other. Both speak of the JSON's own value or, where it has none, of the one in {stem}.lyrics.txt or {stem}.caption.txt.
Otherwise the order is upstream's (`RANK`).
"""

import codecs
import csv
import io
import json
import re
import stat
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from acestep_lora.data import fields

MAX_BYTES = 1 << 20
MACHINE = ("estimator", "transcriber", "captioner")
# From the weakest source to the strongest.
RANK = ("machine", "side-step", ".caption.txt", ".json", ".lrc", ".txt", ".lyrics.txt", ".csv", "reviewed")
_ALIASES = {
    "key": "keyscale", "scale": "keyscale", "tempo": "bpm", "genres": "genre", "repeats": "repeat",
    "signature": "timesignature", "time_signature": "timesignature", "sig": "timesignature",
    "lang": "language", "vocal_language": "language",
}  # fmt: skip

# Two kana or common kanji in a row, in bytes that Western text practically never holds.
_CP932 = re.compile(rb"(?:[\x82\x83\x88-\x98][\x40-\xfc]){2}")
_STAMP = re.compile(r"[\[<]\d{1,3}:\d{1,2}(?:[.:]\d{1,3})?[\]>]")
_LRC_HEADER = re.compile(r"\s*\[(?:ar|ti|al|au|by|offset|length|re|ve|la|tool|#)\s*:[^\]]*\]\s*", re.IGNORECASE)
# Side-Step's fields end at `lyrics:` or at a line of another shape.
_LYRICS = re.compile(r"^[ \t]*lyrics[ \t]*:|^(?![ \t]*[a-z_]+[ \t]*:)(?=.*\S)", re.IGNORECASE | re.MULTILINE)


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def file_key(name: str) -> str:
    """A file name as tables are matched by."""
    return nfc(name).strip().casefold()


def strip_lrc(text: str) -> str:
    """Lyrics without LRC time stamps (`[mm:ss.xx]`, `<mm:ss.xx>`) and headers (`[ar:...]`); other tags stay."""
    rows = [" ".join(_STAMP.sub("", row).split()) if _STAMP.search(row) else row for row in text.splitlines()]
    return "\n".join(row for row in rows if not _LRC_HEADER.fullmatch(row)).strip()


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


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A file's content. Raises ValueError if that is over `limit` bytes, or would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file, not read")
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"larger than {limit >> 20} MB, not read: is it the right file?")
    return raw


def read_text(path: Path, limit: int = MAX_BYTES) -> tuple[str, list[str]]:
    """A text file and, when its encoding had to be guessed, a remark on that.

    Raises ValueError if the file is over `limit` bytes or not text.
    """
    return decode(read_bytes(path, limit))


def decode(raw: bytes) -> tuple[str, list[str]]:
    """What `read_text` makes of a file's bytes."""
    remarks = []
    try:
        text = raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError:
        encoding = "cp932" if _CP932.search(raw) else "cp1252"
        text = raw.decode(encoding, errors="replace")
        remarks.append(f"not UTF-8, read as {encoding}: check it or save it as UTF-8")
    if "\0" in text:
        raise ValueError("holds NUL bytes, not read: save it as UTF-8 text")
    return text, remarks


def parse_json(text: str) -> object:
    """JSON as the standard has it; NaN, Infinity and broken or bottomless documents raise ValueError."""

    def refuse(literal: str) -> None:
        raise ValueError(f"holds {literal}, which is not JSON: use null")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def canonical(record: Mapping) -> dict[str, object]:
    """The fields of a record under their own names, case and aliases resolved; unknown keys are left out."""
    named = {str(key).strip().lower(): value for key, value in record.items()}
    named = {_ALIASES.get(key, key): value for key, value in named.items()}
    return {name: named[name] for name in NORMALISE if name in named}


def side_step(text: str) -> dict[str, object]:
    """The fields of a Side-Step sidecar; none for a text that does not begin with known ones."""
    head, *lyrics = _LYRICS.split(text.strip(), maxsplit=1)
    record = canonical(dict(row.split(":", 1) for row in head.splitlines() if row.strip()))
    return record | {"lyrics": lyrics[0]} if record and lyrics else record


def _parse(suffix: str, text: str) -> tuple[str, dict[str, object]]:
    """The rank's name and the raw record of one sidecar."""
    if suffix == ".json":
        record = parse_json(text)
        if not isinstance(record, dict):
            raise ValueError(f'holds {fields.show(record)}, an object such as {{"bpm": 120}} is expected')
        return suffix, record
    if suffix == ".txt" and (record := side_step(text)):
        return "side-step", record
    return suffix, {"caption" if suffix == ".caption.txt" else "lyrics": text}


def _standing(record: Mapping) -> dict[str, str]:
    """Field -> the rank that a JSON's `reviewed` and `provenance` give it."""
    reviewed, provenance = record.get("reviewed") or [], record.get("provenance") or {}
    objects = provenance.values() if isinstance(provenance, dict) else [provenance]
    if not isinstance(reviewed, bool | list) or not all(isinstance(entry, dict) for entry in objects):
        raise ValueError("reviewed must be true or a list of fields, and provenance an object of objects")
    machine = {name: "machine" for name, entry in provenance.items() if entry.get("kind") in MACHINE}
    return machine | {name: "reviewed" for name in NORMALISE if reviewed is True or name in reviewed}


def read_claims(stem: str, files: Mapping[str, Path]) -> tuple[list[Claim], list[str]]:
    """Claims and problems of a song's own sidecars; `files` maps NFC names to the files of the song's folder."""
    claims, problems, standing = [], [], {}
    for suffix in (".caption.txt", ".lyrics.txt", ".txt", ".lrc", ".json"):
        path = files.get(nfc(stem + suffix))
        if path is None:
            continue
        try:
            text, remarks = read_text(path)
            kind, record = _parse(suffix, text)
            problems += [f"{path.name}: {remark}" for remark in remarks]
            claims += [Claim(name, value, path.name, kind) for name, value in canonical(record).items()]
            standing = _standing(record) if suffix == ".json" else {}
        except (OSError, ValueError) as error:
            problems.append(f"{path.name}: {error}")
    in_json = {claim.field for claim in claims if claim.kind == ".json"}

    def rank(claim: Claim) -> str:
        elsewhere = claim.field not in in_json and claim.kind in (".caption.txt", ".lyrics.txt")
        return standing.get(claim.field, claim.kind) if claim.kind == ".json" or elsewhere else claim.kind

    return [claim._replace(kind=rank(claim)) for claim in claims], problems


def read_csv(path: Path) -> tuple[dict[str, list[Claim]], list[str]]:
    """Claims of a Key-BPM-Finder table by `file_key` of the File cell, and problems; Camelot stands in for Key."""
    claims, problems = {}, []
    try:
        text, problems = read_text(path, limit=16 * MAX_BYTES)
        text = fields.clean(text)
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
        if "file" not in table.fieldnames:
            raise ValueError("there is no File column")
        for row in table:
            if any(row.pop(None, ())):
                problems.append(f"line {table.line_num}: more cells than columns, not read")
            elif row["file"]:
                values = {"bpm": row.get("bpm"), "caption": row.get("caption")}
                values["keyscale"] = row.get("key") or row.get("camelot")
                claims[file_key(row["file"])] = [Claim(*item, path.name, ".csv") for item in values.items()]
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"not read to its end: {error}")
    return claims, problems


def resolve(claims: list[Claim]) -> tuple[dict[str, object], dict[str, object], list[str]]:
    """Values in their normal form, what was written where that differs, and problems.

    Of every field the best-ranked valid claim wins, of equals the later one.
    """
    valid: dict[str, list[tuple[Claim, object]]] = {}
    values, original, problems = {}, {}, []
    for claim in sorted(claims, key=lambda claim: RANK.index(claim.kind)):
        try:
            value = NORMALISE[claim.field](claim.value)
        except ValueError as error:
            problems.append(f"{claim.source}: {claim.field} {error}")
            continue
        if value is not None or claim.kind == "reviewed":
            valid.setdefault(claim.field, []).append((claim, value))
    for name, ranked in valid.items():
        winner, value = ranked[-1]
        if value is not None:
            values[name] = value
        if str(winner.value).strip() != str(value):
            original[name] = winner.value
        if losers := [f"{claim.source} ({fields.show(other)})" for claim, other in ranked if other != value]:
            problems.append(f"{name}: {winner.source} ({fields.show(value)}) wins over {', '.join(losers)}")
    if values.pop("is_instrumental", False) and values.pop("lyrics", fields.INSTRUMENTAL) != fields.INSTRUMENTAL:
        problems.append("is_instrumental is true: the lyrics are not used")
    return values, original, problems
