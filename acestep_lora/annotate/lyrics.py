"""Lyrics as text and as timed lines: LRC, line breaks, the words two texts share, times for given lines, sections.

Pure functions. A structure tag is a line of its own in brackets (`[Verse 1]`); it is no word. In scripts that are
written without spaces (Han, kana, Thai, ...) a character counts as a word.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher

from acestep_lora.annotate.provider import Line
from acestep_lora.errors import UserError

PAUSE = 0.8  # seconds of silence that end a line
LINE_WIDTH = 18  # from here on a comma ends a line; Han and kana count double
MOST = 5000  # timed lines, and words or lines that are compared
SECTIONS = (
    "intro verse pre-chorus chorus post-chorus refrain hook bridge interlude instrumental solo guitar-solo break "
    "build drop rap spoken outro"
).split()

_STAMP = re.compile(r"\[(\d{1,3}):(\d{1,2}(?:[.:]\d{1,3})?)\]")
_WORD_STAMP = re.compile(r"<(\d{1,3}):(\d{1,2}(?:[.:]\d{1,3})?)>")
_CLOSING = re.compile(_WORD_STAMP.pattern + "$")
_HEADER = re.compile(r"\s*\[(offset|la)\s*:([^\]]*)\]\s*", re.IGNORECASE)
_TAG = re.compile(r"\s*[\[［【][^\]］】]*[\]］】]\s*")
_SENTENCE_END, _COMMA, _DROPPED = tuple(".!?。！？…"), tuple(",;:，、；："), " ,.;:，。、；：\n"
_PUNCTUATION = r".!?。！？…,;:，、；："
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:['’][^\W_{_UNSPACED}]+)*")
# Scripts that one language alone uses; Han without kana may be any of several.
_SCRIPTS = {"ja": r"[\u3041-\u30fa]", "ko": r"[\uac00-\ud7a3]", "th": r"[\u0e00-\u0e7f]", "he": r"[\u05d0-\u05ea]"}
_SCRIPTS |= {"el": r"[\u0391-\u03c9]", "pa": r"[\u0a00-\u0a7f]", "ta": r"[\u0b80-\u0bff]", "te": r"[\u0c00-\u0c7f]"}


def _seconds(minutes: str, seconds: str) -> float:
    return round(60 * int(minutes) + float(seconds.replace(":", ".")), 3)


def parse_lrc(text: str) -> tuple[tuple[Line, ...], str | None]:
    """Lines in the order of their times, and the language of the `[la:...]` header.

    A line with several stamps is sung several times. Each ends where a later one begins, an empty one included, or
    at its closing `<mm:ss.xx>`; a tag ends where it starts. A positive `[offset:ms]` makes all earlier.
    Raises UserError for more than MOST.
    """
    found = filter(None, map(_HEADER.fullmatch, text.splitlines()))
    headers = {header[1].lower(): header[2].strip() for header in found}
    offset = float(headers["offset"]) / 1000 if re.fullmatch(r"[+-]?\d{1,9}", headers.get("offset", "")) else 0.0
    stamped = []
    for row in text.splitlines():
        if stamps := _STAMP.findall(row):
            words = _STAMP.sub("", row).strip()
            closing = _CLOSING.search(words)
            end = _seconds(*closing.groups()) - offset if closing else None
            plain = " ".join(_WORD_STAMP.sub("", words).split())
            stamped += [(max(0.0, round(_seconds(*stamp) - offset, 3)), end, plain) for stamp in stamps]
        if len(stamped) > MOST:
            raise UserError(f"there are more than {MOST} timed lines: are these the song's lyrics?")
    stamped.sort(key=lambda line: line[0])
    starts = list(dict.fromkeys(start for start, _, _ in stamped))
    followers = dict(zip(starts, [*starts[1:], None], strict=False))
    lines = []
    for start, end, words in stamped:
        end = end if end is not None and end > start else start if _TAG.fullmatch(words) else followers[start]
        lines += [Line(start, end, words)] if words else []
    return tuple(lines), headers.get("la") or None


def language_of(text: str) -> str | None:
    """The language that the script alone tells, None where it does not."""
    text = plain(text)
    return next((code for code, script in _SCRIPTS.items() if len(re.findall(script, text)) * 10 > len(text)), None)


def plain(text: str) -> str:
    """Lyrics without structure tags and empty lines."""
    return "\n".join(row.strip() for row in text.splitlines() if row.strip() and not _TAG.fullmatch(row))


def has_tags(text: str) -> bool:
    return any(_TAG.fullmatch(row) for row in text.splitlines())


def words(text: str) -> list[str]:
    """What is sung, in lower case and one form of each character: words, or characters of scripts without spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", plain(text)).lower().replace("’", "'"))


def matcher(ours: Sequence[str], theirs: Sequence[str]) -> SequenceMatcher:
    """What two texts share in the same order, of words or of lines; in long ones what is frequent is no anchor.

    Raises UserError for more than MOST, which may take hours to compare.
    """
    if (most := max(len(ours), len(theirs))) > MOST:
        raise UserError(f"there are {most} words or lines to compare, more than {MOST}: are these the song's lyrics?")
    return SequenceMatcher(None, ours, theirs, autojunk=most > MOST // 5)


def overlap(given: str, heard: str) -> float:
    """Share of words that two texts have in the same order, [0, 1]: 2 * common / (both lengths), of the first MOST."""
    return matcher(words(given)[:MOST], words(heard)[:MOST]).ratio()


def units(text: str, spoken: Iterable[Line]) -> list[Line]:
    """Words with times, each with the punctuation and the space that follow it in the full text."""
    found, position = [], 0
    for word in spoken:
        at = text.find(word.text.strip(), position)
        if at >= 0 and word.text.strip():
            found.append((at, word))
            position = at + len(word.text.strip())
    cuts = [0, *(at for at, _ in found[1:]), len(text)]
    return [word._replace(text=text[cuts[i] : cuts[i + 1]]) for i, (_, word) in enumerate(found)]


def spread(phrase: Line) -> list[Line]:
    """The words of a phrase, in scripts without spaces its clauses, each with a share of its time by length."""
    end = phrase.start if phrase.end is None else phrase.end
    parts, position, found = re.findall(rf"[^\s{_PUNCTUATION}]*[{_PUNCTUATION}]*\s*", phrase.text), 0, []
    for part in filter(None, parts):
        times = (phrase.start + (end - phrase.start) * at / len(phrase.text) for at in (position, position + len(part)))
        found.append(Line(*times, part))
        position += len(part)
    return found


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text.strip())


def break_lines(pieces: Sequence[Line], pause: float = PAUSE) -> tuple[Line, ...]:
    """Words or phrases -> lines: a line ends with a sentence, at a pause, and at a comma once it is LINE_WIDTH wide.

    The pieces' texts are joined as they are, spaces included; commas and full stops at the end of a line are dropped.
    """
    lines, row = [], []
    for piece, follower in zip(pieces, [*pieces[1:], None], strict=False):
        row.append(piece)
        text = "".join(part.text for part in row).strip()
        silence = follower.start - piece.end if follower and piece.end is not None else 0.0
        comma = text.endswith(_COMMA) and _width(text) >= LINE_WIDTH
        if follower is None or silence >= pause or text.endswith(_SENTENCE_END) or comma:
            if text := " ".join(text.rstrip(_DROPPED).split()):
                lines.append(Line(round(row[0].start, 3), None if piece.end is None else round(piece.end, 3), text))
            row = []
    return tuple(lines)


def align(given: str, heard: Sequence[Line], least: float = 0.5) -> tuple[Line, ...]:
    """Times of a transcript for given lyrics, row by row; () where fewer than `least` of the words are shared.

    Rows that were not heard share the time between their neighbours evenly. A tag is a line of no length, where the
    row after it starts.
    """
    rows = plain(given).splitlines()
    ours = [(word, row) for row, text in enumerate(rows) for word in words(text)]
    theirs = [(word, moment) for line in heard for word, moment in _moments(line)]
    shared = matcher([word for word, _ in ours], [word for word, _ in theirs])
    if not heard or shared.ratio() < least:
        return ()
    times: dict[int, list[float]] = {}
    for start, other, size in shared.get_matching_blocks():
        for i in range(size):
            times.setdefault(ours[start + i][1], []).extend(theirs[other + i][1])
    spans = [(min(times[row]), max(times[row])) if row in times else None for row in range(len(rows))]
    sung = [Line(*span, row) for span, row in zip(_filled(spans, heard), rows, strict=True)]
    if heard[-1].end is None:
        sung[-1] = sung[-1]._replace(end=None)
    return _with_tags(given, sung)


def _with_tags(given: str, sung: Sequence[Line]) -> tuple[Line, ...]:
    lines, left = [], deque(sung)
    for row in filter(None, map(str.strip, given.splitlines())):
        start = left[0].start if left else sung[-1].end or sung[-1].start
        lines.append(Line(start, start, row) if _TAG.fullmatch(row) else left.popleft())
    return tuple(lines)


def _moments(line: Line) -> list[tuple[str, tuple[float, float]]]:
    """Every word of a line with the start and end of its even share of the line's time."""
    found, end = words(line.text), line.start if line.end is None else line.end
    step = (end - line.start) / max(1, len(found))
    return [(word, (line.start + i * step, line.start + (i + 1) * step)) for i, word in enumerate(found)]


def _filled(spans: list[tuple[float, float] | None], heard: Sequence[Line]) -> list[tuple[float, float]]:
    """Spans of lines, those not known spread evenly between the known ones around them."""
    last = heard[-1].end if heard[-1].end is not None else heard[-1].start
    known = [(-1, heard[0].start), *((i, span) for i, span in enumerate(spans) if span), (len(spans), last)]
    filled = list(spans)
    for (left, before), (right, after) in zip(known, known[1:], strict=False):
        begin = before[1] if left >= 0 else before
        step = ((after[0] if right < len(spans) else after) - begin) / max(1, right - left - 1)
        for i in range(left + 1, right):
            filled[i] = (begin + (i - left - 1) * step, begin + (i - left) * step)
    return [(round(start, 3), round(max(start, end), 3)) for start, end in filled]


def numbered(text: str) -> str:
    """Lyrics as a prompt shows them, so that an answer can speak of line numbers instead of repeating words."""
    return "\n".join(f"{number}: {row}" for number, row in enumerate(plain(text).splitlines(), start=1))


def with_sections(text: str, sections: Mapping[int, str]) -> str:
    """Lyrics with a tag before the lines of these numbers, an empty line before each tag; no word is changed.

    Raises ValueError for a name that is none of SECTIONS (a number may follow), and for lines that are not there.
    """
    rows, tagged = plain(text).splitlines(), []
    if strange := [number for number in sections if not 1 <= number <= len(rows)]:
        raise ValueError(f"there is no line {strange[0]}")
    for number, row in enumerate(rows, start=1):
        if name := sections.get(number, "").strip("[] "):
            kind = re.sub(r"[\s\d]+$", "", name).lower().replace(" ", "-")
            if kind not in SECTIONS:
                raise ValueError(f"{name!r} is no section such as Verse 1 or Chorus")
            tagged += ["", f"[{name}]"]
        tagged.append(row)
    result = "\n".join(tagged).strip()
    if plain(result) != plain(text):
        raise ValueError("words were changed")
    return result
