"""When each line of a song is sung, and what is sung in a part of it."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from acestep_lora.annotate import record
from acestep_lora.annotate.lyrics import matcher, parse_lrc, plain
from acestep_lora.annotate.provider import Line
from acestep_lora.data import sidecars
from acestep_lora.data.fields import INSTRUMENTAL


class Sung(NamedTuple):
    """A line at its time: `head` are the tags and blank lines right before it, `section` is the tag in force."""

    start: float
    end: float
    text: str
    head: tuple[str, ...]
    section: str

    def overlaps(self, start: float, stop: float) -> bool:
        return self.start < stop and self.end > start or start <= self.start == self.end < stop


def read_lines(song: Path) -> tuple[Line, ...]:
    """The timed lines beside a song: {stem}.lyrics.json, else {stem}.lrc, else none.

    Raises ValueError or OSError for a file that cannot be used.
    """
    stems = {unicodedata.normalize(form, song.stem) for form in ("NFC", "NFD")}
    if any(song.with_name(f"{stem}.lyrics.json").is_file() for stem in stems):
        return record.read_lines(song)
    for stem in stems:
        if (path := song.with_name(f"{stem}.lrc")).is_file():
            return parse_lrc(sidecars.read_text(path)[0])[0]
    return ()


def align(lyrics: str, lines: Sequence[Line], duration: float) -> list[Sung]:
    """The lyrics in force at the times of `lines`, in the order they are sung; [] for no times.

    Line by line: an edited line keeps its time; lines that have none share the time of those they replace, or lie
    between their neighbours; a line that `lines` have more often than the lyrics is sung that often. A line without
    an end lasts until the next. duration: of the song, in seconds. Raises UserError for far too many lines.
    """
    timed = sorted((line for line in lines if plain(line.text) and line.start < duration), key=lambda line: line.start)
    rows = _rows(lyrics)
    if not timed or not rows:
        return []
    later = [line.start for line in timed[1:]] + [duration]
    ends = [start if line.end is None else line.end for line, start in zip(timed, later, strict=True)]
    spans = [(line.start, min(duration, max(line.start, end))) for line, end in zip(timed, ends, strict=True)]
    old, new = [_letters(line.text) for line in timed], [_letters(text) for text, *_ in rows]
    found = []
    for change, a, b, c, d in matcher(old, new).get_opcodes():
        if change == "delete":
            found += [(spans[i], rows[new.index(old[i])]) for i in range(a, b) if old[i] in new]
        elif b - a == d - c:
            found += zip(spans[a:b], rows[c:d], strict=True)
        else:
            first = spans[a][0] if a < b else spans[a - 1][1] if a else 0.0
            last = spans[b - 1][1] if a < b else spans[a][0] if a < len(spans) else duration
            found += zip(_shares(first, max(first, last), [len(text) for text in new[c:d]]), rows[c:d], strict=True)
    return sorted((Sung(*span, *row) for span, row in found), key=lambda line: line.start)


def _rows(lyrics: str) -> list[tuple[str, tuple[str, ...], str]]:
    """Text, head and section of every sung line."""
    rows, head, section = [], [], ""
    for row in map(str.strip, lyrics.splitlines()):
        if plain(row):
            rows.append((row, tuple(head), section))
            head = []
        else:
            head.append(row)
            section = row or section
    return rows


def _letters(text: str) -> str:
    """A line without what editors change in passing: case, punctuation, spaces."""
    return "".join(sign for sign in unicodedata.normalize("NFKC", text).casefold() if sign.isalnum()) or text


def _shares(first: float, last: float, lengths: list[int]) -> list[tuple[float, float]]:
    """Consecutive spans from `first` to `last`, as long in proportion as their texts."""
    bounds = [first + (last - first) * sum(lengths[:i]) / sum(lengths) for i in range(len(lengths) + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def excerpt(song: list[Sung], start: float, stop: float) -> str:
    """What is sung from `start` to `stop` (seconds), under the section tag in force; `[Instrumental]` if nothing is.

    A line that is sung only partly in there is whole in the text.
    """
    rows, section = [], None
    for line in song:
        if line.overlaps(start, stop):
            repeated = () if line.section == section else (line.section,)
            rows += [*(line.head if rows and any(line.head) else repeated), line.text]
            section = line.section
    return "\n".join(rows).strip() or INSTRUMENTAL


def starts(frames: int, crop: int | None) -> list[int]:
    """First frames of the windows that crops are taken from: every half crop, the last one ending with the song."""
    if not crop or frames <= crop:
        return [0]
    hop = max(1, crop // 2)
    return [*range(0, frames - crop, hop), frames - crop]
