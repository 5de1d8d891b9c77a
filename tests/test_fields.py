import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_lora.data import fields

LANGUAGES = """ar az bg bn ca cs da de el en es fa fi fr he hi hr ht hu id is it ja ko la lt ms ne nl no pa pl pt ro ru
sa sk sr sv sw ta te th tl tr uk ur vi yue zh unknown""".split()
KEYS = [f"{note}{sign} {mode}" for note in "ABCDEFG" for sign in ("", "#", "b") for mode in ("major", "minor")]
PITCH = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
UNSAID = [None, "", " ", "N/A", "unknown", "-", "None"]


def pitch_class(key: str) -> int:
    return (PITCH[key[0]] + key.count("#") - key[1:].split()[0].count("b") * (key[1] == "b")) % 12


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("128 BPM", 128),
        ("120,5", 120),
        ("120.4", 120),
        (99.6, 100),
        (30, 30),
        ("300", 300),
        ("~90bpm", 90),
        ("１２８", 128),
    ],
)
def test_bpm(written, expected):
    assert fields.bpm(written) == expected


@pytest.mark.parametrize("written", [-3, 0, 29.9, 301, "fast", "120-130", True, math.inf, math.nan, 10**400, [120], {}])
def test_bpm_is_refused_by_value(written):
    with pytest.raises(ValueError, match="is not"):
        fields.bpm(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Dm", "D minor"),
        ("D♭ major", "Db major"),
        ("a min", "A minor"),
        ("C#m", "C# minor"),
        ("C♯m", "C# minor"),
        ("Bb", "Bb major"),
        ("bb", "Bb major"),
        ("b", "B major"),
        ("B", "B major"),
        ("bm", "B minor"),
        ("F sharp minor", "F# minor"),
        ("E-flat Major", "Eb major"),
        ("CM", "C major"),
        ("G MINOR", "G minor"),
        ("F#_min", "F# minor"),
        ("8A", "A minor"),
        ("10b", "D major"),
        ("12B", "E major"),
    ],
)
def test_keyscale(written, expected):
    assert fields.keyscale(written) == expected


@pytest.mark.parametrize("written", ["H dur", "B dur", "H", "13A", "0A", "C dorian", "A B", "Am/C", 5, ["Am"]])
def test_keyscale_is_refused_by_value(written):
    with pytest.raises(ValueError, match="is not"):
        fields.keyscale(written)


def test_every_key_of_upstream_is_a_fixed_point():
    assert [fields.keyscale(key) for key in KEYS] == KEYS
    assert [fields.keyscale(key.replace("#", "♯").replace("b ", "♭ ")) for key in KEYS] == KEYS


@pytest.mark.parametrize("hour", range(1, 13))
def test_camelot_is_the_circle_of_fifths(hour):
    major, minor = fields.keyscale(f"{hour}B"), fields.keyscale(f"{hour}A")
    assert (major in KEYS, minor in KEYS) == (True, True)
    assert pitch_class(major) == (hour - 8) * 7 % 12
    assert pitch_class(minor) == (pitch_class(major) - 3) % 12


@pytest.mark.parametrize(
    ("written", "expected"),
    [("4/4", "4"), ("3/4", "3"), ("6/8", "6"), ("2/4", "2"), (4, "4"), ("3", "3"), (6.0, "6"), (" 4 / 4 ", "4")],
)
def test_timesignature(written, expected):
    assert fields.timesignature(written) == expected


@pytest.mark.parametrize("written", [99, "5/4", "12/8", "4/", "common", True, [4]])
def test_timesignature_is_refused_by_value(written):
    with pytest.raises(ValueError, match="is not"):
        fields.timesignature(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("ja-JP", "ja"),
        ("EN", "en"),
        ("zh-Hans", "zh"),
        ("pt_BR", "pt"),
        ("instrumental", None),
    ],
)
def test_language(written, expected):
    assert fields.language(written) == expected


@pytest.mark.parametrize("written", ["klingon", "xx", "en/ja", "English and Japanese", "Japanese", 7])
def test_language_is_refused_by_value(written):
    with pytest.raises(ValueError, match="is not one of the 51 codes"):
        fields.language(written)


def test_languages_are_those_of_inference():
    assert sorted(fields.LANGUAGES) == sorted(LANGUAGES)
    assert [fields.language(code) for code in LANGUAGES if code != "unknown"] == LANGUAGES[:-1]


@pytest.mark.parametrize("normalise", [fields.bpm, fields.keyscale, fields.timesignature, fields.language, fields.flag])
@pytest.mark.parametrize("written", UNSAID)
def test_what_says_nothing_is_none(normalise, written):
    assert normalise(written) is None


def test_small_fields():
    assert [fields.flag(value) for value in (True, "no", 1, "TRUE", 0)] == [True, False, True, True, False]
    assert [fields.repeat(value) for value in (3, "2", 1000)] == [3, 2, 1000]
    assert [fields.percent(value) for value in (0, 12.5, "100 %")] == [0, 12, 100]
    assert fields.prompt_override("Genre") == "genre"
    assert fields.caption("  two\r\n lines\x1b red\x07 ") == "two lines red"
    for normalise, value in [(fields.flag, 2), (fields.repeat, 0), (fields.repeat, True), (fields.repeat, 10**9),
                             (fields.percent, 101), (fields.prompt_override, "both"), (fields.caption, 5),
                             (fields.caption, ["rock"])]:  # fmt: skip
        with pytest.raises(ValueError, match="is not"):
            normalise(value)


def test_clean_keeps_text_and_newlines_only():
    assert fields.clean("a\r\nb\rc\td") == "a\nb\nc\td"
    assert fields.clean("\x1b[2Jx\x07\x9b\x00\x7f\ud800東京 🎵") == "[2Jx東京 🎵"


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.text(), max_size=3),
    st.from_regex(r"\A[A-Ha-h][#b♭♯]?[ _-]?(m|min|major|dur)?\Z"),
    st.from_regex(r"\A[0-9]{1,4}[.,/]?[0-9]{0,3} ?(bpm)?\Z"),
)


@given(anything)
def test_a_value_becomes_a_form_inference_knows_or_is_refused(value):
    forms = {
        fields.bpm: range(30, 301),
        fields.keyscale: KEYS,
        fields.timesignature: ("2", "3", "4", "6"),
        fields.language: LANGUAGES,
        fields.flag: (True, False),
        fields.repeat: range(1, 1001),
        fields.percent: range(101),
        fields.prompt_override: ("caption", "genre"),
    }
    for normalise, known in forms.items():
        try:
            found = normalise(value)
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 200
            continue
        assert found is None or found in known
        assert found is None or normalise(found) == found


@given(st.text())
def test_clean_text_is_printable_utf8_and_stays_clean(text):
    once = fields.clean(text)
    assert fields.clean(once) == once
    assert once.encode("utf-8").decode("utf-8") == once
    assert not any(ord(char) < 32 and char not in "\n\t" or 127 <= ord(char) < 160 for char in once)
    assert "\n" not in fields.line(text)
