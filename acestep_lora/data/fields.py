"""Song annotations in the form inference accepts: BPM, key, time signature, language, and the plain text around them.

Every function takes a value as it was found (JSON, CSV or text) and returns the normal form, None where nothing is
said ("", "N/A", null), or raises ValueError that begins with the value. The normal forms are those of upstream's
`constants.py`.
"""

import re
import reprlib
import unicodedata
from collections.abc import Mapping

INSTRUMENTAL = "[Instrumental]"
BPM_RANGE = (30, 300)
_UNSAID = {"", "-", "?", "n/a", "na", "none", "null", "unknown"}
_SIGNATURES = {"2": "2", "2/4": "2", "3": "3", "3/4": "3", "4": "4", "4/4": "4", "6": "6", "6/8": "6"}
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

_BPM = re.compile(r"[~≈]? ?(\d{1,4}(?:[.,]\d+)?) ?(?:bpm)?", re.IGNORECASE)
_KEY = re.compile(r"([A-Ga-g])(#|b|[ _-]*(?:sharp|flat))?(?:[ _-]*(M|m|maj|min|major|minor|dur|moll))?")
_MODES = dict.fromkeys((None, "M", "maj", "major", "dur"), "major")
_MODES |= dict.fromkeys(("m", "min", "minor", "moll"), "minor")
_CAMELOT = re.compile(r"(1[0-2]|[1-9]) ?([AB])", re.IGNORECASE)
# The Camelot wheel from hour 1 to 12, a fifth per hour.
_WHEEL = {
    "B": ("B F# Db Ab Eb Bb F C G D A E".split(), "major"),
    "A": ("G# Eb Bb F C G D A E B F# C#".split(), "minor"),
}

# ISO 639-1 code, then the ISO 639-2/3 codes and English names that mean it.
_LANGUAGES = """
ar ara arabic|az aze azerbaijani|bg bul bulgarian|bn ben bengali bangla|ca cat catalan|cs ces cze czech|da dan danish
de deu ger german|el ell gre greek|en eng english|es spa spanish castilian|fa fas per persian farsi|fi fin finnish
fr fra fre french|he heb iw hebrew|hi hin hindi|hr hrv croatian|ht hat haitian|hu hun hungarian|id ind in indonesian
is isl ice icelandic|it ita italian|ja jpn jp japanese|ko kor korean|la lat latin|lt lit lithuanian|ms msa may malay
ne nep nepali|nl nld dut dutch flemish|no nor nb nob nn nno norwegian|pa pan punjabi panjabi|pl pol polish
pt por portuguese|ro ron rum romanian|ru rus russian|sa san sanskrit|sk slk slo slovak|sr srp serbian|sv swe swedish
sw swa swahili|ta tam tamil|te tel telugu|th tha thai|tl tgl fil tagalog filipino|tr tur turkish|uk ukr ukrainian
ur urd urdu|vi vie vietnamese|yue cantonese|zh zho chi cmn chinese mandarin|instrumental"""
_LANGUAGE = {word: group.split()[0] for group in re.split(r"[|\n]", _LANGUAGES.strip()) for word in group.split()}
_LANGUAGE_TAG = re.compile(r"([a-z]+)(?:[-_][a-z0-9_-]+| ?\(.*\))?")
LANGUAGES = frozenset(_LANGUAGE.values()) - {"instrumental"} | {"unknown"}

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
# C0 and C1 controls but tab and newline, and lone surrogates, which no UTF-8 file can hold.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """Text without terminal escapes and control characters other than tab and newline; CRLF and CR become newlines."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


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


def _choice(value: object, options: Mapping, expected: str):
    text = _said(value)
    if text is not None and text.lower().replace(" ", "") not in options:
        raise ValueError(f"{show(value)} is not {expected}")
    return None if text is None else options[text.lower().replace(" ", "")]


def bpm(value: object) -> int | None:
    """Beats per minute, 30..300, rounded to the whole number inference takes; "128 BPM" and "120,5" are read."""
    text = _said(value)
    if text is None:
        return None
    match = _BPM.fullmatch(text)
    low, high = BPM_RANGE
    if not match or not low <= (number := float(match[1].replace(",", "."))) <= high:
        raise ValueError(f"{show(value)} is not a number from {low} to {high}")
    return round(number)


def keyscale(value: object) -> str | None:
    """`[A-G][#b] major|minor` from a key name ("Dm", "D♭ major") or a Camelot code ("8A")."""
    text = _said(value)
    if text is None:
        return None
    text = text.replace("♯", "#").replace("♭", "b")
    if match := _CAMELOT.fullmatch(text):
        tonics, mode = _WHEEL[match[2].upper()]
        return f"{tonics[int(match[1]) - 1]} {mode}"
    match = _KEY.fullmatch(text) or _KEY.fullmatch(text.lower())
    # H, and B before a German mode word, name other notes in German than elsewhere: refused rather than guessed.
    if not match or (match[1] in "Bb" and not match[2] and match[3] in ("dur", "moll")):
        raise ValueError(f"{show(value)} is not a key such as 'F# minor', 'Bb' or '8A'")
    accidental = (match[2] or "").replace("sharp", "#").replace("flat", "b").strip(" _-")
    return f"{match[1].upper()}{accidental} {_MODES[match[3]]}"


def timesignature(value: object) -> str | None:
    """The numerator "2", "3", "4" or "6", as inference takes it, from itself or from 2/4, 3/4, 4/4 and 6/8."""
    return _choice(value, _SIGNATURES, "2/4, 3/4, 4/4 or 6/8")


def language(value: object) -> str | None:
    """One of `LANGUAGES` from a code, a tag with a region or script ("ja-JP", "zh-Hans") or an English name.

    "instrumental" passes through: it tells of a song without words, not of a language.
    """
    text = _said(value)
    if text is None or text.lower() in ("und", "auto"):
        return None
    match = _LANGUAGE_TAG.fullmatch(text.lower())
    if not match or match[1] not in _LANGUAGE:
        raise ValueError(f"{show(value)} is not one of the {len(LANGUAGES)} codes inference knows (en, ja, ...)")
    return _LANGUAGE[match[1]]


def caption(value: object) -> str | None:
    """One line of text; a list of words is joined by commas."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = ", ".join(value)
    if not isinstance(value, str | None):
        raise ValueError(f"{show(value)} is not text")
    return line(value or "") or None


def flag(value: object) -> bool | None:
    return _choice(value, _FLAGS, "true or false")


def prompt_override(value: object) -> str | None:
    return _choice(value, {"caption": "caption", "genre": "genre"}, "'caption' or 'genre'")


def repeat(value: object) -> int | None:
    """How often a song counts in an epoch, 1..1000."""
    text = _said(value)
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,4}", text) or not 1 <= int(text) <= 1000:
        raise ValueError(f"{show(value)} is not a whole number from 1 to 1000")
    return int(text)
