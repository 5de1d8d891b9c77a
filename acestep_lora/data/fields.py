"""Song annotations in the form inference accepts: BPM, key, time signature, language, and the plain text around them.

Every function takes a value as it was found (JSON, CSV or text) and returns the normal form, None where nothing is
said ("", "N/A", null), or raises ValueError that begins with the value. The normal forms are those of upstream's
`constants.py`.
"""

import re
import reprlib
import unicodedata
from functools import partial

INSTRUMENTAL = "[Instrumental]"
_UNSAID = {"", "-", "?", "n/a", "na", "none", "null", "unknown"}
_SIGNATURES = {"2": "2", "2/4": "2", "3": "3", "3/4": "3", "4": "4", "4/4": "4", "6": "6", "6/8": "6"}
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

_KEY = re.compile(r"([A-G])(#|b|[ _-]*(?:sharp|flat))?(?:[ _-]*(m|maj|min|major|minor))?", re.IGNORECASE)
_CAMELOT = re.compile(r"(1[0-2]|[1-9]) ?([AB])", re.IGNORECASE)
# The Camelot wheel from hour 1 to 12, a fifth per hour.
_WHEEL = {"A": "G# Eb Bb F C G D A E B F# C#".split(), "B": "B F# Db Ab Eb Bb F C G D A E".split()}

LANGUAGES = frozenset(
    """ar az bg bn ca cs da de el en es fa fi fr he hi hr ht hu id is it ja ko la lt ms ne nl no
    pa pl pt ro ru sa sk sr sv sw ta te th tl tr uk ur vi yue zh unknown""".split()
)

# C0 and C1 controls but tab and newline, and lone surrogates, which no UTF-8 file can hold.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """Text without control characters other than tab and newline; CRLF and CR become newlines."""
    return _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def line(text: str) -> str:
    """Text on one line, every run of white space a single space."""
    return " ".join(clean(text).split())


def show(value: object) -> str:
    """A value as messages quote it: short, on one line, printable."""
    return line(reprlib.repr(value))


def _said(value: object) -> str | None:
    """The one-line compatibility form (NFKC) of a single value, or None where it says nothing."""
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{show(value)} is not a single value")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else line(unicodedata.normalize("NFKC", str(value)))
    return None if text.lower() in _UNSAID else text


def _choice(value: object, options: dict[str, object], expected: str):
    text = _said(value)
    if text is not None and text.lower().replace(" ", "") not in options:
        raise ValueError(f"{show(value)} is not {expected}")
    return None if text is None else options[text.lower().replace(" ", "")]


def _number(value: object, low: int, high: int, pattern: str) -> int | None:
    text = _said(value)
    if text is None:
        return None
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    if not match or not low <= (number := float(match[1].replace(",", "."))) <= high:
        raise ValueError(f"{show(value)} is not a number from {low} to {high}")
    return round(number)


# Beats per minute as inference takes them, from "128 BPM" or "120,5" too.
bpm = partial(_number, low=30, high=300, pattern=r"[~≈]? ?(\d{1,4}(?:[.,]\d+)?) ?(?:bpm)?")
repeat = partial(_number, low=1, high=1000, pattern=r"(\d{1,4})")
percent = partial(_number, low=0, high=100, pattern=r"(\d{1,3}(?:[.,]\d+)?) ?%?")
# The numerator, as inference takes it.
timesignature = partial(_choice, options=_SIGNATURES, expected="2/4, 3/4, 4/4 or 6/8")
flag = partial(_choice, options=_FLAGS, expected="true or false")
prompt_override = partial(_choice, options={"caption": "caption", "genre": "genre"}, expected="'caption' or 'genre'")


def pitch_class(note: str) -> int:
    """Semitones of a note such as "C#" or "Cb" above C, 0 to 11."""
    return ("C D EF G A B".index(note[0]) + note.count("#") - note.count("b")) % 12


def keyscale(value: object) -> str | None:
    """`[A-G][#b] major|minor` from a key name ("Dm", "D♭ major") or a Camelot code ("8A")."""
    text = _said(value)
    if text is None:
        return None
    text = text.replace("♯", "#").replace("♭", "b")
    if match := _CAMELOT.fullmatch(text):
        letter = match[2].upper()
        return f"{_WHEEL[letter][int(match[1]) - 1]} {'major' if letter == 'B' else 'minor'}"
    match = _KEY.fullmatch(text)
    if not match:
        raise ValueError(f"{show(value)} is not a key such as 'F# minor', 'Bb' or '8A'")
    accidental = (match[2] or "").lower().replace("sharp", "#").replace("flat", "b").strip(" _-")
    minor = match[3] == "m" or (match[3] or "").lower().startswith("min")  # CM is C major
    return f"{match[1].upper()}{accidental} {'minor' if minor else 'major'}"


def language(value: object) -> str | None:
    """One of `LANGUAGES`, also from a tag with a region or script ("ja-JP", "zh-Hans")."""
    text = _said(value)
    if text is None or text.lower() in ("und", "auto", "instrumental"):
        return None
    code = re.split("[-_]", text.lower())[0]
    if code not in LANGUAGES:
        raise ValueError(f"{show(value)} is not one of the {len(LANGUAGES)} codes inference knows (en, ja, ...)")
    return code


def caption(value: object) -> str | None:
    """Text on one line."""
    if not isinstance(value, str | None):
        raise ValueError(f"{show(value)} is not text")
    return line(value or "") or None
