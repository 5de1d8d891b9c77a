"""Lyrics as text and timed lines: what LRC players, singers and two scripts make of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_lora.annotate import lyrics
from acestep_lora.annotate.provider import Line
from acestep_lora.data.sidecars import strip_lrc

ROWS = st.lists(st.text("ab cd'éß歌うかー가!?,.。（）-", min_size=1, max_size=20), min_size=1, max_size=12)


def starts(lines) -> list[tuple[float, str]]:
    return [(line.start, line.text) for line in lines]


# ---------------------------------------------------------------- LRC


def test_lrc_of_every_kind():
    text = (
        "[ti:Song]\n[la: ja]\n[00:01.5]one\n[00:03:25]three and a quarter\n[01:02.345]a minute\n"
        "[00:10.00][00:20.00]twice\n[00:12.00]\n\n[00:15.00]<00:15.00>two <00:16.00>words<00:17.50>\n[Chorus]\nno\n"
    )
    lines, language = lyrics.parse_lrc(text)
    assert language == "ja"
    assert lines == (
        Line(1.5, 3.25, "one"),
        Line(3.25, 10.0, "three and a quarter"),
        Line(10.0, 12.0, "twice"),  # the empty stamp ends it
        Line(15.0, 17.5, "two words"),  # and the closing word stamp
        Line(20.0, 62.345, "twice"),
        Line(62.345, None, "a minute"),
    )


@pytest.mark.parametrize("offset, start", [("+500", 9.5), ("-250", 10.25), ("0", 10.0), ("soon", 10.0), ("99999", 0.0)])
def test_lrc_offset_makes_lines_earlier(offset, start):
    assert lyrics.parse_lrc(f"[offset:{offset}]\n[00:10.00]x")[0] == (Line(start, None, "x"),)


def test_lrc_lines_of_the_same_time_end_together_and_tags_have_no_length():
    lines, _ = lyrics.parse_lrc("[00:01.00][Verse 1]\n[00:01.00]歌\n[00:01.00]a song\n[00:04.00]more")
    assert [(line.start, line.end) for line in lines] == [(1, 1), (1, 4), (1, 4), (4, None)]


@given(ROWS)
def test_lrc_lines_are_what_the_scan_reads(rows):
    text = "\n".join(f"[00:{second:02}.00]{row}" for second, row in enumerate(rows))
    lines, _ = lyrics.parse_lrc(text)
    assert [line.text for line in lines] == [row for row in strip_lrc(text).split("\n") if row]


# ---------------------------------------------------------------- words


def test_words_are_characters_where_nothing_separates_them():
    assert lyrics.words("[Verse 1]\nDon’t stop — ＡＢＣ\n君の name") == ["don't", "stop", "abc", "君", "の", "name"]
    assert lyrics.words("[Instrumental]") == lyrics.words("...") == []


def test_overlap_counts_words_in_order():
    assert lyrics.overlap("[Verse]\nwe are the stars", "We are the stars!") == 1.0
    assert lyrics.overlap("a b c d", "a b x d") == 0.75
    assert lyrics.overlap("君の名は", "君の夢は") == 0.75
    assert lyrics.overlap("a b", "c d") == 0.0


@pytest.mark.parametrize(
    "text, code",
    [("君のうた", "ja"), ("너의 노래", "ko"), ("เพลง", "th"), ("τραγούδι", "el"), ("chanson", None), ("歌", None)],
)
def test_the_script_tells_the_language_if_it_can(text, code):
    assert lyrics.language_of(text) == code
    assert lyrics.language_of(f"[Verse 1]\n{text}") == code


# ---------------------------------------------------------------- lines


def spoken(text: str, starts: list[float], length: float = 0.3) -> list[Line]:
    return [Line(start, start + length, word) for start, word in zip(starts, text.split(), strict=True)]


def test_lines_break_at_sentences_pauses_and_late_commas():
    words = spoken("Oh no I never meant to go so far away", [0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8, 4.5, 4.9])
    pieces = lyrics.units("Oh, no! I never meant to go, so far away.", words)
    assert "".join(piece.text for piece in pieces) == "Oh, no! I never meant to go, so far away."
    assert starts(lyrics.break_lines(pieces)) == [
        (0, "Oh, no!"),  # not at the first comma
        (0.8, "I never meant to go"),
        (2.8, "so"),  # a pause of 1.4 s
        (4.5, "far away"),
    ]


def test_japanese_lines_break_at_its_own_punctuation_and_have_no_spaces():
    phrase = Line(10.0, 20.0, "君の名前を呼ぶ声が聞こえる、遠い空。もう一度")
    lines = lyrics.break_lines(lyrics.spread(phrase))
    assert [line.text for line in lines] == ["君の名前を呼ぶ声が聞こえる", "遠い空", "もう一度"]
    assert lines[0].start == 10.0 and lines[-1].end == 20.0
    assert all(line.end == following.start for line, following in zip(lines, lines[1:], strict=False))


@given(st.text("abc 歌う,.!?。、\n", max_size=60), st.floats(0, 100), st.floats(0, 50))
def test_breaking_loses_no_word_and_keeps_the_order(text, start, length):
    pieces = lyrics.spread(Line(start, start + length, text))
    lines = lyrics.break_lines(pieces)
    assert lyrics.words(" ".join(line.text for line in lines)) == lyrics.words(text)
    times = [time for line in lines for time in (line.start, line.end)]
    assert times == sorted(times)


@pytest.mark.parametrize("row", ["[00:01.00]I <3 you -->", "[00:01.00]>", "[offset:-" + "9" * 400 + "]\n[00:01.00]a"])
def test_odd_rows_of_an_lrc_are_rows(row):
    [line], _ = lyrics.parse_lrc(row)
    assert (line.start, line.end) == (1.0, None)


# ---------------------------------------------------------------- times for given lyrics


def test_given_lyrics_get_the_times_of_what_was_heard():
    given = "[Verse 1]\nHarbour lights aglow\nlost in translation\n\n[Chorus]\nWait for me below"
    heard = [Line(1.0, 3.0, "harbor lights aglow"), Line(7.0, 9.0, "wait for me below")]
    assert lyrics.align(given, heard) == (
        Line(1.667, 1.667, "[Verse 1]"),
        Line(1.667, 3.0, "Harbour lights aglow"),
        Line(3.0, 7.0, "lost in translation"),
        Line(7.0, 7.0, "[Chorus]"),
        Line(7.0, 9.0, "Wait for me below"),
    )


def test_a_transcript_of_something_else_gives_no_times():
    assert lyrics.align("one two three", [Line(0, 1, "four five six")]) == ()
    assert lyrics.align("one two three", []) == lyrics.align("", [Line(0, 1, "four")]) == ()


@settings(deadline=None)
@given(ROWS, ROWS)
def test_times_rise_and_the_rows_stay(rows, heard):
    given = "\n".join(rows)
    timed = lyrics.align(given, [Line(10.0 * i, 10.0 * i + 5, row) for i, row in enumerate(heard)], least=0.01)
    times = [time for line in timed for time in (line.start, line.end)]
    assert times == sorted(times)
    assert not timed or [line.text for line in timed] == [row.strip() for row in rows if row.strip()]


# ---------------------------------------------------------------- sections


def test_sections_go_before_their_lines():
    text = "Walking down\nthe street\n\nWe are the stars"
    assert lyrics.numbered(text) == "1: Walking down\n2: the street\n3: We are the stars"
    tagged = lyrics.with_sections(text, {1: "Verse 1", 3: "[Pre-Chorus]"})
    assert tagged == "[Verse 1]\nWalking down\nthe street\n\n[Pre-Chorus]\nWe are the stars"


@pytest.mark.parametrize("sections", [{1: "I love you"}, {0: "Verse"}, {9: "Verse"}, {1: "Verse]\nnew words\n["}])
def test_what_is_no_section_is_refused(sections):
    with pytest.raises(ValueError):
        lyrics.with_sections("one\ntwo", sections)


@given(ROWS, st.dictionaries(st.integers(-1, 14), st.sampled_from(["Verse 1", "Chorus", "x", "", "[Bridge]", "\n"])))
def test_sections_change_no_word_whatever_a_model_says(rows, sections):
    text = "\n".join(rows)
    try:
        tagged = lyrics.with_sections(text, sections)
    except ValueError:
        return
    assert lyrics.plain(tagged) == lyrics.plain(text)
    assert lyrics.words(tagged) == lyrics.words(text)
