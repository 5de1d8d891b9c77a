"""Timed lines: what is sung in a part of a song, and how the lyrics in force get their times."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_lora.annotate.provider import Line
from acestep_lora.data.fields import INSTRUMENTAL
from acestep_lora.data.lines import align, excerpt, read_lines, starts

LYRICS = """[Verse 1]
Lanterns on the water
Drifting one by one

[Chorus]
Hold the light
Hold it high

[Guitar Solo]

[Chorus]
Hold the light
Carry me home"""
TIMES = [
    Line(2.0, 5.0, "Lanterns on the water"),
    Line(5.5, 8.0, "Drifting one by one"),
    Line(10.0, 12.0, "Hold the light"),
    Line(12.0, 14.0, "Hold it high"),
    Line(30.0, 32.0, "Hold the light"),
    Line(32.5, 36.0, "Carry me home"),
]


@pytest.mark.parametrize(
    "start, stop, expected",
    [
        (0, 40, LYRICS),
        (0, 6, "[Verse 1]\nLanterns on the water\nDrifting one by one"),
        (6, 11, "[Verse 1]\nDrifting one by one\n\n[Chorus]\nHold the light"),
        (12, 20, "[Chorus]\nHold it high"),
        (13, 31, "[Chorus]\nHold it high\n\n[Guitar Solo]\n\n[Chorus]\nHold the light"),
        (33, 40, "[Chorus]\nCarry me home"),
        (0, 2, INSTRUMENTAL),
        (14, 30, INSTRUMENTAL),
        (36, 40, INSTRUMENTAL),
    ],
)
def test_a_part_has_its_lines_under_the_tag_in_force(start, stop, expected):
    assert excerpt(align(LYRICS, TIMES, 40.0), start, stop) == expected


def sung(lyrics: str, lines: list[Line], duration: float = 40.0) -> list[tuple[float, float, str]]:
    return [(line.start, line.end, line.text) for line in align(lyrics, lines, duration)]


def test_edited_words_keep_their_lines_time():
    edited = LYRICS.replace("Drifting one by one", "Drifting, two by two!").replace("Hold it high", "hold it - HIGH")
    assert [times[:2] for times in sung(edited, TIMES)] == [line[:2] for line in TIMES]
    assert sung(edited, TIMES)[1][2] == "Drifting, two by two!"


def test_lines_without_times_lie_between_their_neighbours():
    added = LYRICS.replace("one by one\n", "one by one\nAnd on\nAnd away\n")
    extra = {text: (start, end) for start, end, text in sung(added, TIMES)}
    assert 8.0 == extra["And on"][0] < extra["And on"][1] == extra["And away"][0] < extra["And away"][1] == 10.0
    first_and_last = sung("Before\n" + LYRICS + "\nAfter", TIMES)
    assert first_and_last[0] == (0.0, 2.0, "Before") and first_and_last[-1] == (36.0, 40.0, "After")


def test_joined_and_divided_lines_share_the_time():
    joined = LYRICS.replace("Lanterns on the water\nDrifting", "Lanterns on the water, drifting")
    assert sung(joined, TIMES)[0] == (2.0, 8.0, "Lanterns on the water, drifting one by one")
    divided = LYRICS.replace("Carry me home", "Carry me\nhome")
    assert [round(value, 1) for value in sung(divided, TIMES)[-2][:2]] == [32.5, 34.7]
    assert sung(divided, TIMES)[-1][1] == 36.0


def test_lines_taken_out_are_not_sung():
    shorter = LYRICS.replace("Hold it high\n", "")
    assert [text for *_, text in sung(shorter, TIMES)].count("Hold the light") == 2
    assert (12.0, 14.0, "Hold it high") not in sung(shorter, TIMES)


def test_a_chorus_written_once_is_sung_as_often_as_timed():
    once = LYRICS.rpartition("\n\n[Chorus]")[0]
    assert excerpt(align(once, TIMES, 40.0), 30, 32) == "[Chorus]\nHold the light"


def test_ends_that_are_not_known():
    open_ended = [line._replace(end=None) for line in TIMES]
    assert [(start, end) for start, end, _ in sung(LYRICS, open_ended)][1::3] == [(5.5, 10.0), (30.0, 32.5)]
    assert sung(LYRICS, open_ended)[-1][1] == 40.0
    assert all(end <= 33.0 for _, end, _ in sung(LYRICS, TIMES, 33.0))  # a song cut short
    assert sung(LYRICS, []) == [] and align("", TIMES, 40.0) == []


words = st.text("abcdefghijklm ", min_size=1, max_size=12).filter(str.strip)
songs = st.lists(
    st.tuples(words, st.floats(0, 20), st.floats(0.01, 20), st.sampled_from(["", "[Verse]", "[Chorus]"])), min_size=1
)


@given(songs, st.floats(0, 300), st.floats(0.1, 60))
def test_every_line_of_a_window_is_in_its_text_and_no_other(rows, start, length):
    """Lines with known times: numbered, so that each is only itself; the text has them in order, and tags besides."""
    lines, lyrics, clock = [], [], 0.0
    for i, (text, pause, sung_for, tag) in enumerate(rows):
        lines.append(Line(clock + pause, clock + pause + sung_for, f"{text.strip()} {i}"))
        clock = lines[-1].end
        lyrics += [tag] * bool(tag) + [lines[-1].text]
    text = excerpt(align("\n".join(lyrics), lines, clock + 1), start, start + length)
    expected = [line.text for line in lines if line.start < start + length and line.end > start]
    assert [row for row in text.splitlines() if row and not row.startswith("[")] == expected
    assert (text == INSTRUMENTAL) == (not expected)
    if expected:
        before = lyrics[: lyrics.index(expected[0])]
        tags = [row for row in before if row.startswith("[")]
        assert text.splitlines()[0] == (tags[-1] if tags else expected[0])


@given(st.integers(1, 3000), st.integers(1, 1000))
def test_windows_cover_the_song(frames, crop):
    found = starts(frames, crop)
    assert found[0] == 0 and found[-1] + min(crop, frames) == frames
    assert all(0 < later - earlier <= max(1, crop // 2) for earlier, later in zip(found, found[1:], strict=False))
    assert all(start == k * max(1, crop // 2) for k, start in enumerate(found[:-1]))


# ---------------------------------------------------------------- files


def test_times_are_read_beside_the_song(tmp_path):
    song = tmp_path / "夜が.flac"
    assert read_lines(song) == ()
    (tmp_path / "夜が.lrc").write_text("[offset:500]\n[00:01.50][00:09]夜\n[00:04]\n", encoding="utf-8")
    assert read_lines(song) == (Line(1.0, 3.5, "夜"), Line(8.5, None, "夜"))
    document = {"language": "ja", "lines": [{"start": 2, "end": None, "text": "夜"}]}
    (tmp_path / "夜が.lyrics.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_lines(song) == (Line(2, None, "夜"),)
    assert read_lines(tmp_path / "夜か\u3099.flac") == read_lines(song)  # as macOS spells it


@pytest.mark.parametrize("content", ["{}", '{"lines": [{"start": "one", "text": "a"}]}', "not json"])
def test_foreign_files_are_told(tmp_path, content):
    (tmp_path / "a.lyrics.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="lyrics.json"):
        read_lines(Path(tmp_path / "a.wav"))
