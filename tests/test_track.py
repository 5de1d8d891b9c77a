import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
import unicodedata
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from acestep_lora.data import fields
from acestep_lora.data.sidecars import NORMALISE, file_key, parse_json, read_claims, read_csv, read_text, strip_lrc
from acestep_lora.data.track import Track, read_dataset_json, scan, table, write_dataset_json
from acestep_lora.errors import UserError

SIDECARS = Path(__file__).parent / "data" / "sidecars"
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")


def song(path: Path, seconds: float = 0.25) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), np.zeros((int(8000 * seconds), 1)), 8000, format="WAV")
    return path


def write(path: Path, content: str | bytes | dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def one(folder: Path, **options) -> Track:
    """The only track of a folder that has one song, made if needed."""
    if not (folder / "song.wav").exists():
        song(folder / "song.wav")
    (track,) = scan(folder, **options).tracks
    return track


def one_caption(folder: Path, stem: str) -> str:
    song(folder / f"{stem}.wav")
    return scan(folder).tracks[0].caption


def shown(found) -> str:
    out = StringIO()
    Console(file=out, width=240).print(table(found))
    return out.getvalue()


# ---------------------------------------------------------------- sidecars of every kind


def test_a_bare_song_is_named_after_its_file(tmp_path):
    song(tmp_path / "my_first-song.wav", seconds=0.5)
    found = scan(tmp_path)
    (track,) = found.tracks
    assert track == Track(
        id="my_first-song.wav",
        path=tmp_path / "my_first-song.wav",
        caption="my first song",
        has_caption=False,
        duration=0.5,
    )
    assert found.problems == []
    assert "file name" in shown(found)
    assert one_caption(tmp_path / "odd", "___") == "___"
    refused = scan(tmp_path, require_caption=True)
    assert refused.tracks == [] and refused.problems[0][0] == track.path


def test_the_sidecars_of_bad_audio(tmp_path):
    shutil.copytree(SIDECARS, tmp_path, dirs_exist_ok=True)
    for stem in [*"abcdefghij", "k, with comma"]:
        song(tmp_path / f"{stem}.wav").rename(tmp_path / f"{stem}.mp3")  # libsndfile goes by content
    found = scan(tmp_path)
    tracks = {track.path.stem[0]: track for track in found.tracks}
    assert len(tracks) == 11
    assert tracks["a"].problems[0].startswith("a.json: ") and "line 1" in tracks["a"].problems[0]
    assert "b.json: holds [1, 2]" in tracks["b"].problems[0]
    c = tracks["c"]
    assert (c.caption, c.bpm, c.keyscale, c.timesignature, c.language) == ("ok", 128, "A minor", "4", "en")
    assert c.original == {"bpm": "128 BPM", "keyscale": "a min", "timesignature": "4/4", "language": "EN"}
    rejected = " ".join(tracks["d"].problems)
    assert "bpm -3" in rejected and "keyscale 'H dur'" in rejected and "timesignature 99" in rejected
    assert (tracks["d"].bpm, tracks["d"].keyscale, tracks["d"].timesignature) == (None, "", "")
    assert tracks["e"].lyrics == "[Verse]\nhello wörld"
    assert tracks["f"].lyrics == "café déjà vu" and "not UTF-8" in tracks["f"].problems[0]
    assert tracks["g"].is_instrumental and tracks["g"].lyrics == "[Instrumental]"
    assert tracks["h"].lyrics == "utf-16 text" and not tracks["h"].is_instrumental
    assert tracks["i"].caption == "line one line two"
    assert "NaN" in tracks["j"].problems[0] and tracks["j"].bpm is None
    assert (tracks["k"].bpm, tracks["k"].keyscale) == (120, "A minor") and tracks["k"].original["bpm"] == "120,5"
    reasons = {path.name: reason for path, reason in found.problems}
    assert reasons.keys() == {"orphan.lyrics.txt", "key_bpm.csv"}
    assert "'missing.mp3'" in reasons["key_bpm.csv"]


def test_all_fields_of_a_json(tmp_path):
    record = {
        "caption": "c",
        "genre": "rock, pop",
        "bpm": 90,
        "key": "Dm",
        "timesignature": 3,
        "language": "ja-JP",
        "custom_tag": "zzz",
        "prompt_override": "genre",
        "repeat": 4,
        "lyrics": "la",
        "unknown": {"x": 1},
    }
    write(tmp_path / "song.json", record)
    track = one(tmp_path, custom_tag="other", tag_position="append")
    assert (track.genre, track.keyscale, track.timesignature, track.language) == ("rock, pop", "D minor", "3", "ja")
    assert (track.custom_tag, track.prompt_override, track.repeat, track.lyrics) == ("zzz", "genre", 4, "la")
    assert track.prompt("c") == "c, zzz"
    assert not track.problems


@pytest.mark.parametrize(
    ("position", "text", "expected"),
    [("prepend", "x", "tag, x"), ("append", "x", "x, tag"), ("replace", "x", "tag"), ("append", "", "tag")],
)
def test_trigger_tag(tmp_path, position, text, expected):
    assert one(tmp_path, custom_tag="tag", tag_position=position).prompt(text) == expected
    assert one(tmp_path, tag_position=position).prompt(text) == text


def test_tag_position_is_checked(tmp_path):
    with pytest.raises(UserError, match="'before' is none of prepend, append, replace"):
        scan(tmp_path, tag_position="before")


def test_side_step_text_is_read_and_not_taken_for_lyrics(tmp_path):
    write(
        tmp_path / "song.txt",
        "caption: warm pads\ngenre: ambient\ntempo: 128\nscale: D♭ major\nsig: 6/8\nis_instrumental: false\n"
        "lang: en\nrepeats: 2\nmood: calm\nlyrics: [Verse 1]\nwords: here\nand here\n",
    )
    track = one(tmp_path)
    assert (track.caption, track.genre, track.bpm, track.keyscale) == ("warm pads", "ambient", 128, "Db major")
    assert (track.timesignature, track.language, track.repeat) == ("6", "en", 2)
    assert track.lyrics == "[Verse 1]\nwords: here\nand here"
    write(tmp_path / "song.json", {"bpm": 90})
    write(tmp_path / "song.caption.txt", "cold pads")
    write(tmp_path / "song.lyrics.txt", "other words")
    track = one(tmp_path)
    assert (track.bpm, track.caption, track.lyrics, track.genre) == (90, "cold pads", "other words", "ambient")
    assert "bpm: song.json (90) wins over song.txt (128)" in track.problems


def test_text_that_only_looks_like_side_step(tmp_path):
    write(tmp_path / "song.txt", "She said: hello\nbpm: high\n")
    assert one(tmp_path).lyrics == "She said: hello\nbpm: high"
    write(tmp_path / "song.txt", "Genre: rock\nBPM: 120\n\n[Verse 1]\nno lyrics key\n")
    track = one(tmp_path)
    assert (track.genre, track.bpm, track.lyrics) == ("rock", 120, "[Verse 1]\nno lyrics key")


# ---------------------------------------------------------------- precedence


def test_upstreams_order(tmp_path):
    write(tmp_path / "song.caption.txt", "from caption.txt")
    assert one(tmp_path).caption == "from caption.txt"
    write(tmp_path / "song.json", {"caption": "from json", "bpm": 100, "timesignature": "3/4"})
    assert one(tmp_path).caption == "from json"
    write(tmp_path / "a.csv", "File,BPM,Caption\nsong.wav,110,from a\n")
    write(tmp_path / "b.csv", "File,BPM,Key\nsong.wav,,Am\n")
    track = one(tmp_path)
    assert (track.caption, track.bpm, track.keyscale, track.timesignature) == ("from a", 110, "A minor", "3")
    write(tmp_path / "b.csv", "File,BPM\nsong.wav,120\n")
    assert one(tmp_path).bpm == 120  # the last table wins
    assert "bpm: b.csv (120) wins over song.json (100), a.csv (110)" in one(tmp_path).problems
    write(tmp_path / "song.json", {"bpm": "120 bpm", "caption": " from  a"})
    (tmp_path / "song.caption.txt").unlink()
    assert one(tmp_path).problems == ("bpm: b.csv (120) wins over a.csv (110)",)


def test_order_of_lyrics(tmp_path):
    for suffix in (".json", ".lrc", ".txt", ".lyrics.txt"):  # each beats those before
        write(tmp_path / f"song{suffix}", {"lyrics": "json"} if suffix == ".json" else f"[00:01.00]{suffix}")
        assert one(tmp_path).lyrics == suffix.replace(".json", "json")
    write(tmp_path / "song.lyrics.txt", "  \n")
    assert one(tmp_path).lyrics == ".txt"  # an empty file counts as absent


@pytest.mark.parametrize("reviewed", [True, ["bpm", "caption"]])
def test_reviewed_beats_every_source(tmp_path, reviewed):
    write(tmp_path / "song.json", {"bpm": 90, "keyscale": "Am", "reviewed": reviewed})
    write(tmp_path / "song.caption.txt", "reviewed caption")
    write(tmp_path / "x.csv", "File,BPM,Key,Caption\nsong.wav,180,Cm,machine caption\n")
    track = one(tmp_path)
    assert (track.bpm, track.caption) == (90, "reviewed caption")
    assert track.keyscale == ("A minor" if reviewed is True else "C minor")
    assert "bpm: song.json (90) wins over x.csv (180)" in track.problems


def test_a_reviewed_blank_stays_blank_and_a_reviewed_mistake_does_not_win(tmp_path):
    write(tmp_path / "x.csv", "File,BPM,Key\nsong.wav,180,Cm\n")
    write(tmp_path / "song.json", {"bpm": None, "keyscale": "H dur", "reviewed": True})
    track = one(tmp_path)
    assert (track.bpm, track.keyscale) == (None, "C minor")
    assert "keyscale 'H dur'" in track.problems[0]


@pytest.mark.parametrize("kind", ["estimator", "transcriber", "captioner"])
def test_unreviewed_machine_values_lose_to_every_other(tmp_path, kind):
    origin = {"kind": kind, "provider": "p", "confidence": 0.9}
    record = {"timesignature": "3", "bpm": 90, "provenance": {"timesignature": origin, "lyrics": origin}}
    write(tmp_path / "song.lyrics.txt", "transcribed")
    write(tmp_path / "song.json", record)
    track = one(tmp_path)
    assert (track.timesignature, track.lyrics, track.bpm) == ("3", "transcribed", 90)
    write(tmp_path / "song.txt", "signature: 4/4\nbpm: 91\nlyrics: by hand")
    track = one(tmp_path)
    assert (track.timesignature, track.lyrics, track.bpm) == ("4", "by hand", 90)
    write(tmp_path / "song.json", record | {"reviewed": ["lyrics", "timesignature"]})
    track = one(tmp_path)
    assert (track.timesignature, track.lyrics) == ("3", "transcribed")


@pytest.mark.parametrize("record", [{"reviewed": 5}, {"provenance": []}, {"provenance": {"bpm": "estimator"}}, []])
def test_a_misshapen_json_costs_no_song(tmp_path, record):
    write(tmp_path / "song.json", record if record == [] else record | {"bpm": 90})
    track = one(tmp_path)
    assert track.bpm == (None if record == [] else 90)
    assert len(track.problems) == (0 if record == {"provenance": []} else 1)


def test_the_table_names_the_winner(tmp_path):
    write(tmp_path / "song.json", {"bpm": 90})
    write(tmp_path / "x.csv", "File,BPM\nsong.wav,180\n")
    one(tmp_path)
    assert "bpm: x.csv (180) wins over song.json (90)" in shown(scan(tmp_path))


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp932"])
def test_csv_in_every_dress(tmp_path, delimiter, encoding):
    rows = [
        ["FILE", "Artist", "bpm", "Key", "Camelot", "Caption"],
        ["東京の夜.WAV", "a", '"120,5"', "", "8A", '"カ, ;x"'],
    ]
    path = write(tmp_path / "x.csv", "\r\n".join(delimiter.join(row) for row in rows).encode(encoding))
    found, problems = read_csv(path)
    claims = {claim.field: claim.value for claim in found.pop("東京の夜.wav")}
    assert claims == {"bpm": "120,5", "keyscale": "8A", "caption": "カ, ;x"} and not found
    assert bool(problems) == (encoding == "cp932")


def test_csv_rows_find_their_songs(tmp_path):
    song(tmp_path / "one" / "Song.WAV")
    song(tmp_path / "two" / "song.wav")
    song(tmp_path / "two" / unicodedata.normalize("NFD", "naïve.wav"))
    write(tmp_path / "x.csv", f"File,BPM\nsong.wav,100\n{unicodedata.normalize('NFC', 'Naïve')}.wav,77")
    song(tmp_path / "one" / "far.wav")
    write(tmp_path / "two" / "y.csv", "File,BPM\nsong.wav,122\nfar.wav,1\n")
    found = scan(tmp_path)
    assert {track.id: track.bpm for track in found.tracks} == {
        "one/Song.WAV": 100,
        "one/far.wav": None,
        "two/song.wav": 122,
        "two/naïve.wav": 77,
    }
    ((path, reason),) = found.problems
    assert path.name == "y.csv" and "far.wav" in reason  # a table does not reach out of its folder


def test_many_rows_without_a_song_are_one_remark(tmp_path):
    write(tmp_path / "x.csv", "File,BPM\n" + "\n".join(f"{n}.mp3,100" for n in range(9)))
    ((_, reason),) = scan(tmp_path).problems
    assert reason == "rows without a song here (9): '0.mp3', '1.mp3', '2.mp3'"


def test_csv_that_is_none(tmp_path):
    write(tmp_path / "x.csv", "Name,BPM\nsong.wav,100\n")
    write(tmp_path / "y.csv", 'File,BPM\nsong.wav,100,9\nsong.wav,101\n"open,102\n')
    song(tmp_path / "song.wav")
    found = scan(tmp_path)
    assert found.tracks[0].bpm == 101
    reasons = [f"{path.name}: {reason}" for path, reason in found.problems]
    assert len(reasons) == 3 and "x.csv: not read to its end: there is no File column" in reasons
    assert "y.csv: line 2: more cells" in reasons[1] and "y.csv: not read to its end" in reasons[2]


# ---------------------------------------------------------------- lyrics


def test_strip_lrc():
    lrc = (
        "[ar:Someone]\n[ti: A song]\n[offset:+500]\n[by:me]\n[#:note]\n\n[00:01.00][01:02.345]Line one\n"
        "[00:02]<00:02.10> word <00:02.50> by <00:02.70>syl<00:02.80>lable\n"
        "[Verse 1]\n[Intro: soft piano]\n[00:03.5]\n[00:04.00][Chorus]\nend [x2]"
    )
    expected = "Line one\nword by syllable\n[Verse 1]\n[Intro: soft piano]\n\n[Chorus]\nend [x2]"
    assert strip_lrc(lrc) == strip_lrc(lrc.replace("\n", "\r\n")) == expected


@given(st.lists(st.sampled_from("[Verse 1]|plain words|[Bridge: quiet]|(oh) <hey>||[x: y]|12:30".split("|"))))
def test_strip_lrc_leaves_plain_lyrics_alone(lines):
    text = "\n".join(lines).strip()
    assert strip_lrc(text) == text
    stamped = "\n".join(f"[00:{n:02d}.5]{row}" for n, row in enumerate(lines[:60]))
    assert strip_lrc(stamped) == "\n".join(lines[:60]).strip()


def test_instrumental(tmp_path):
    assert one(tmp_path).is_instrumental
    write(tmp_path / "song.json", {"language": "instrumental"})
    assert (one(tmp_path).language, one(tmp_path).problems) == ("unknown", ())
    write(tmp_path / "song.json", {"is_instrumental": False})
    assert (one(tmp_path).lyrics, one(tmp_path).is_instrumental) == ("[Instrumental]", True)
    write(tmp_path / "song.json", {"language": "ja"})
    assert (one(tmp_path).language, one(tmp_path).is_instrumental) == ("ja", True)
    write(tmp_path / "song.txt", "words")
    track = one(tmp_path)
    assert (track.lyrics, track.is_instrumental, track.language, track.problems) == ("words", False, "ja", ())
    track = one(tmp_path, all_instrumental=True)
    assert (track.lyrics, track.is_instrumental, track.language) == ("[Instrumental]", True, "unknown")
    write(tmp_path / "song.json", {"is_instrumental": "yes"})
    assert (one(tmp_path).lyrics, one(tmp_path).is_instrumental) == ("[Instrumental]", True)
    assert one(tmp_path).problems == ("is_instrumental is true: the lyrics are not used",)
    write(tmp_path / "song.json", {})
    write(tmp_path / "song.txt", "[instrumental]\n")
    assert (one(tmp_path).lyrics, one(tmp_path).is_instrumental) == ("[Instrumental]", True)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp932", "shift_jis"])
def test_japanese_text_is_read(tmp_path, encoding):
    text, remark = read_text(write(tmp_path / "x", "夢の中で\r\nキスをして".encode(encoding)))
    assert text == "夢の中で\r\nキスをして"
    assert bool(remark) == (encoding in ("cp932", "shift_jis"))


@pytest.mark.parametrize(
    "words",
    ["été", "bébés", "Dédé a été", "I don’t know — “why”", "er sagt ‚so‘ – ‚nein‘", "GRÜN ÄÖÜ straße", "señor mañana"],
)
def test_western_text_is_not_taken_for_japanese(tmp_path, words):
    assert read_text(write(tmp_path / "x", words.encode("cp1252")))[0] == words


def test_text_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="larger than 1 MB"):
        read_text(write(tmp_path / "x", b"x" * (2**20 + 1)))
    with pytest.raises(ValueError, match="NUL"):
        read_text(write(tmp_path / "x", b"RIFF\0\0"))


def test_a_huge_sidecar_is_refused_unread(tmp_path):
    with open(tmp_path / "song.lyrics.txt", "wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    track = one(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert track.is_instrumental and "larger than 1 MB" in track.problems[0]
    assert peak < 8 << 20


@pytest.mark.parametrize("text", ["[NaN]", "-Infinity", "[" * 10**5, "1" * 5000, '{"a": 1,\n}', ""])
def test_json_that_is_none_is_refused(text):
    with pytest.raises(ValueError):
        parse_json(text)


# ---------------------------------------------------------------- folders


def test_only_audio_files_become_tracks(tmp_path):
    for name in (
        "b.wav",
        "a/b.wav",
        "a/B.FLAC",
        "x.aiff",
        "photo.raw",
        ".hidden.wav",
        ".acestep/cached.wav",
        "._b.wav",
    ):
        song(tmp_path / name)
    (tmp_path / "folder.wav").mkdir()
    for name in ("empty.mp3", "notes.txt", "song.safetensors"):
        write(tmp_path / name, b"")
    write(tmp_path / "broken.mp3", b"not audio")
    write(tmp_path / "ground_truth.json", [{"file": "b.wav"}])
    write(tmp_path / "gone.lrc", "la")
    found = scan(tmp_path)
    assert [track.id for track in found.tracks] == ["a/B.FLAC", "a/b.wav", "b.wav", "broken.mp3", "x.aiff"]
    assert [track.duration for track in found.tracks] == [0.25, 0.25, 0.25, 0.0, 0.25]
    assert [(path.name, reason[:12]) for path, reason in found.problems] == [
        ("gone.lrc", "belongs to n"),
        ("empty.mp3", "is empty (0 "),
    ]
    assert all(track.problems == () for track in found.tracks)


@pytest.mark.parametrize(("audio", "sidecar"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_meet_whatever_their_unicode_form(tmp_path, audio, sidecar):
    song(tmp_path / unicodedata.normalize(audio, "ümläut が🎵 (mix #1).v1.0.wav"))
    write(tmp_path / unicodedata.normalize(sidecar, "ümläut が🎵 (mix #1).v1.0.lyrics.txt"), "words")
    found = scan(tmp_path)
    (track,) = found.tracks
    assert found.problems == []
    assert track.lyrics == "words"
    assert track.id == unicodedata.normalize("NFC", "ümläut が🎵 (mix #1).v1.0.wav")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that keeps both forms apart")
def test_two_names_of_one_normal_form_stay_two_songs(tmp_path):
    for form in ("NFC", "NFD"):
        song(tmp_path / unicodedata.normalize(form, "é.wav"))
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.wav", os.O_CREAT))
    found = scan(tmp_path)
    assert [track.id for track in found.tracks] == ["é.wav", "é.wav-2"]
    assert "invalid Unicode" in found.problems[0][1] and shown(found)


@needs_links
def test_links(tmp_path):
    songs, elsewhere = tmp_path / "songs", tmp_path / "elsewhere"
    song(songs / "b" / "song.wav")
    song(elsewhere / "far" / "song.wav")
    (songs / "a").symlink_to("b")
    (songs / "b" / "up").symlink_to("..")
    (songs / "b" / "top").symlink_to("/")
    (songs / "far").symlink_to(elsewhere)
    (songs / "b" / "linked.wav").symlink_to("song.wav")
    (songs / "gone.wav").symlink_to("nowhere.wav")
    (songs / "self.wav").symlink_to("self.wav")
    os.mkfifo(songs / "pipe.wav")
    os.mkfifo(songs / "b" / "song.txt")
    found = scan(songs)
    assert [track.id for track in found.tracks] == ["b/linked.wav", "b/song.wav"]
    reasons = {path.name: reason for path, reason in found.problems}
    assert reasons.keys() == {"a", "up", "top", "far", "gone.wav", "self.wav", "pipe.wav"}
    assert "not followed" in reasons["far"] and "not a regular file" in reasons["pipe.wav"]
    assert [track.id for track in scan([songs / "far"]).tracks] == ["far/song.wav"]  # a folder given may be a link


def test_several_folders(tmp_path):
    for folder in ("x/mine", "y/mine", "other"):
        song(tmp_path / folder / "song.wav")
    write(tmp_path / "other" / "song.json", {"repeat": 3})
    found = scan([str(tmp_path / "x/mine"), tmp_path / "y/mine", {"dir": str(tmp_path / "other"), "repeat": 2}])
    assert {track.id: track.repeat for track in found.tracks} == {
        "mine/song.wav": 1,
        "mine/song.wav-2": 1,
        "other/song.wav": 6,
    }
    assert scan([tmp_path / "other"]).tracks == scan(str(tmp_path / "other")).tracks
    with pytest.raises(UserError, match="nowhere"):
        scan([tmp_path / "nowhere"])
    for wrong in ({"dir": str(tmp_path), "repeat": 0}, {"dir": str(tmp_path), "times": 2}, 5):
        with pytest.raises(UserError, match="is not a number|is not a folder"):
            scan([wrong])


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for name in ("c", "a", "b", "a/x", "b/x"):
        song(tmp_path / f"{name}.wav")
        write(tmp_path / f"{name}.caption.txt", "")
        write(tmp_path / f"{name}-orphan.caption.txt", "")
    expected = scan(tmp_path)
    walk = os.walk

    def shuffled(*args, **kwargs):
        for folder, subfolders, names in walk(*args, **kwargs):
            random.shuffle(subfolders)
            random.shuffle(names)
            yield folder, subfolders, names

    monkeypatch.setattr(os, "walk", shuffled)
    assert all(scan(tmp_path) == expected for _ in range(5))
    assert [track.id for track in expected.tracks] == ["a.wav", "a/x.wav", "b.wav", "b/x.wav", "c.wav"]
    assert len(expected.problems) == 5


def test_the_table_is_safe_to_print(tmp_path):
    write(tmp_path / "song.json", {"bpm": "\x1b[2J[bold]x[/]", "keyscale": "\x07\u009b31m"})
    write(tmp_path / "x.csv", "File\n\x1b]0;evil\x07.mp3\n")
    if sys.platform != "win32":
        song(tmp_path / "[red]\x1b[31m\n[/red].wav")
    song(tmp_path / "song.wav")
    text = shown(scan(tmp_path))
    assert "\x1b" not in text and "\x07" not in text and "\x9b" not in text
    assert "[bold]x[/]" in text
    assert sys.platform == "win32" or ("[red][31m [/red].wav" in text and "has a name with control" in text)
    (tmp_path / "x.csv").unlink()
    write(tmp_path / "\x1b[31m.mp3", b"") if sys.platform != "win32" else None
    found = read_dataset_json(write(tmp_path / "d.json", [{"audio_path": "\x1b[31m.mp3"}]))
    assert len(found.problems) == 1 and "\x1b" not in shown(found)


def test_a_stream_without_a_length_has_an_unknown_duration(tmp_path):
    soundfile.write(str(tmp_path / "a.flac"), np.zeros((8000, 1)), 8000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # STREAMINFO's count of samples: unknown
    (tmp_path / "b.flac").write_bytes(data)
    assert soundfile.info(str(tmp_path / "b.flac")).frames > 2**60
    assert [track.duration for track in scan(tmp_path).tracks] == [1.0, 0.0]


def test_scanning_imports_no_torch():
    code = "import sys, acestep_lora.data.track; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# ---------------------------------------------------------------- dataset.json


def told(track: Track) -> Track:
    """A track without the story of where its values come from."""
    return replace(track, original={}, problems=())


def test_round_trip(tmp_path):
    for name in ("bare.wav", "sub/full.wav", "日本/が.wav"):
        song(tmp_path / name, seconds=1.5)
    write(
        tmp_path / "sub/full.json",
        {
            "caption": 'a "quoted" 音',
            "genre": "g",
            "bpm": "128 BPM",
            "key": "Dm",
            "repeat": 2,
            "timesignature": "6/8",
            "language": "ja",
            "prompt_override": "genre",
            "custom_tag": "own",
        },
    )
    write(tmp_path / "sub/full.txt", "[Verse]\n歌詞")
    write(tmp_path / "日本/が.json", {"language": "en", "custom_tag": ""})
    found = scan(tmp_path, custom_tag="tag", tag_position="append")
    path = tmp_path / "dataset.json"
    write_dataset_json(found.tracks, path, name="mine", genre_ratio=20)
    back = read_dataset_json(path)
    assert [told(track) for track in back.tracks] == [told(track) for track in found.tracks]
    assert (back.problems, back.genre_ratio) == ([], 20)
    before = path.read_bytes()
    os.link(path, tmp_path / "old")
    write_dataset_json(back.tracks, path, name="mine", genre_ratio=20)
    assert path.read_bytes() == before
    assert not path.samefile(tmp_path / "old")  # replaced, never written in place
    (tmp_path / "old").unlink()
    assert scan(tmp_path, custom_tag="tag", tag_position="append").tracks == found.tracks  # dataset.json is no sidecar
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file()) == ["bare.wav", "dataset.json"]
    document = json.loads(before)
    write(path, document | {"samples": document["samples"][::-1]})
    assert [track.id for track in read_dataset_json(path).tracks] == [track.id for track in found.tracks]
    assert document["metadata"] == {
        "name": "mine",
        "custom_tag": "",
        "tag_position": "append",
        "num_samples": 3,
        "all_instrumental": False,
        "genre_ratio": 20,
    }
    assert document["samples"][1].keys() == {
        "id",
        "audio_path",
        "filename",
        "caption",
        "genre",
        "lyrics",
        "raw_lyrics",
        "formatted_lyrics",
        "bpm",
        "keyscale",
        "timesignature",
        "duration",
        "language",
        "is_instrumental",
        "custom_tag",
        "labeled",
        "prompt_override",
        "repeat",
    }
    assert document["samples"][0]["duration"] == 1
    assert len({sample["id"] for sample in document["samples"]}) == 3
    assert b'\n  "metadata"' in before and "歌詞".encode() in before


def test_a_dataset_json_away_from_its_songs(tmp_path):
    for name in ("music/a/x.wav", "music/b/x.wav", "more/a/x.wav"):
        song(tmp_path / name)
    paths = [
        str(tmp_path / name) for name in ("music/a/x.wav", "music/b/x.wav", "more/a/x.wav", "sets/../music/a/x.wav")
    ]
    found = read_dataset_json(write(tmp_path / "sets" / "d.json", [{"audio_path": path} for path in paths]))
    assert [track.id for track in found.tracks] == ["a/x.wav", "a/x.wav-2", "a/x.wav-3", "b/x.wav"]


def test_a_moved_dataset_finds_its_songs(tmp_path):
    song(tmp_path / "old" / "sub" / "é.wav")
    tracks = scan(tmp_path / "old", custom_tag="tag").tracks
    write_dataset_json(tracks, tmp_path / "old" / "dataset.json")
    ids = [track.id for track in read_dataset_json(tmp_path / "old" / "dataset.json").tracks]
    (tmp_path / "old").rename(tmp_path / "new")
    found = read_dataset_json(tmp_path / "new" / "dataset.json")
    assert [track.id for track in found.tracks] == ids == ["sub/é.wav"]
    metadata = json.loads((tmp_path / "new" / "dataset.json").read_text("utf-8"))["metadata"]
    assert (metadata["name"], metadata["custom_tag"]) == ("untitled_dataset", "tag")


@pytest.mark.parametrize(
    "sample",
    [
        {"audio_path": "sub/sóng.wav"},
        {"audio_path": "sub\\sóng.wav"},
        {"audio_path": "C:\\Music\\sub\\sóng.wav"},
        {"audio_path": "/nowhere/sub/sóng.wav", "filename": "other.wav"},
        {"audio_path": "gone.wav", "filename": "sub/sóng.wav"},
        {"audio_path": unicodedata.normalize("NFD", "./sub/../sub/sóng.wav")},
    ],
)
@pytest.mark.parametrize(("shape", "form"), [("list", "NFC"), ("samples", "NFD")])
def test_paths_in_a_dataset_json(tmp_path, sample, shape, form):
    song(tmp_path / "sub" / unicodedata.normalize(form, "sóng.wav"))
    samples = [sample | {"caption": "c", "bpm": "99", "surprise": 1}]
    found = read_dataset_json(write(tmp_path / "d.json", samples if shape == "list" else {"samples": samples}))
    assert [(track.id, track.caption, track.bpm) for track in found.tracks] == [("sub/sóng.wav", "c", 99)]


def test_a_dataset_json_in_another_encoding(tmp_path):
    song(tmp_path / "a.wav")
    sample = json.dumps([{"audio_path": "a.wav", "caption": "夜のうた"}], ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16", "cp932"):
        found = read_dataset_json(write(tmp_path / "d.json", sample.encode(encoding)))
        assert found.tracks[0].caption == "夜のうた"
        assert [reason[:9] for _, reason in found.problems] == ["not UTF-8"] * (encoding == "cp932")


def test_settings_of_a_dataset_json(tmp_path):
    for name in ("a", "b", "c"):
        song(tmp_path / f"{name}.wav")
    metadata = {"custom_tag": "tag", "tag_position": "append", "all_instrumental": True, "genre_ratio": 50}
    samples = [
        {"audio_path": "a.wav", "caption": "x", "lyrics": "words", "custom_tag": "tag"},
        {"audio_path": "b.wav", "caption": "x", "custom_tag": "own", "labeled": True},
        {"audio_path": "c.wav", "caption": "", "labeled": False},
    ]
    path = write(tmp_path / "d.json", {"metadata": metadata, "samples": samples})
    found = read_dataset_json(path)
    assert [track.prompt("x") for track in found.tracks] == ["x, tag", "x, own", "x, tag"]
    assert [track.lyrics for track in found.tracks] == ["words", "[Instrumental]", "[Instrumental]"]
    assert [track.has_caption for track in found.tracks] == [True, True, False]
    assert found.genre_ratio == 50
    found = read_dataset_json(
        path, custom_tag="new", tag_position="prepend", all_instrumental=True, require_caption=True
    )
    assert [track.prompt("x") for track in found.tracks] == ["new, x", "own, x"]
    assert all(track.is_instrumental for track in found.tracks) and found.problems[0][0].name == "c.wav"
    for wrong in ({"tag_position": ["x"]}, {"genre_ratio": 500}, {"custom_tag": 7}, ["metadata"]):
        write(path, {"metadata": wrong, "samples": samples})
        with pytest.raises(UserError, match="is not|is none of"):
            read_dataset_json(path)


def test_bad_samples_cost_only_themselves(tmp_path):
    song(tmp_path / "a.wav")
    write(tmp_path / "secret.txt", "no audio")
    write(tmp_path / "empty.wav", b"")
    bad = [
        None,
        5,
        {},
        {"audio_path": "gone.wav"},
        {"audio_path": "secret.txt"},
        {"audio_path": "empty.wav"},
        {"audio_path": "a\0.wav"},
        {"audio_path": ["a.wav"]},
        {"audio_path": "x/" * 10**5},
        {"audio_path": "a" * 5000},
        {"audio_path": "\ud800.wav"},
    ]
    path = tmp_path / "d.json"
    path.write_text(
        json.dumps([*bad, {"audio_path": "a.wav", "bpm": "fast"}, {"audio_path": "a.wav"}]), encoding="utf-8"
    )
    found = read_dataset_json(path)
    assert [track.id for track in found.tracks] == ["a.wav", "a.wav-2"]
    assert "d.json: bpm 'fast'" in found.tracks[0].problems[0]
    assert len(found.problems) == len(bad) and shown(found)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[NaN]", b"5", b'{"samples": 3}', b"\0", b'{"metadata": {}}', b"\xff\xfex"]
)
def test_a_file_that_is_no_dataset_is_one_sentence(tmp_path, content):
    with pytest.raises(UserError, match="d.json"):
        read_dataset_json(write(tmp_path / "d.json", content))
    with pytest.raises(UserError, match="gone.json"):
        read_dataset_json(tmp_path / "gone.json")


# ---------------------------------------------------------------- any bytes


def check(track: Track) -> None:
    """A track that downstream code can rely on."""
    assert track.bpm is None or 30 <= track.bpm <= 300
    assert track.timesignature in ("", "2", "3", "4", "6") and track.language in fields.LANGUAGES
    assert track.keyscale == "" or fields.keyscale(track.keyscale) == track.keyscale
    assert track.prompt_override in (None, "caption", "genre") and 1 <= track.repeat <= 1000
    assert (
        track.caption == fields.line(track.caption) != "" and track.lyrics == fields.clean(track.lyrics).strip() != ""
    )
    assert track.is_instrumental <= (track.lyrics == "[Instrumental]")
    json.dumps(told(track).__dict__ | {"path": ""}, allow_nan=False).encode("utf-8")


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["Am", "4/4", "ja", "120"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
names = st.sampled_from([*NORMALISE, "key", "reviewed", "provenance", "audio_path", "filename", "labeled"])
records = st.dictionaries(names | st.text(), values | st.lists(names) | st.dictionaries(names, values), max_size=8)
texts = st.text() | st.lists(
    st.sampled_from(["bpm: 120", "caption: x", "lyrics:", "File,BPM", "song.wav,", "[00:01]", '"'])
).map("\n".join)
contents = st.one_of(
    st.binary(),
    records.map(lambda record: json.dumps(record).encode()),
    st.tuples(texts, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp932", "latin-1"])).map(
        lambda pair: pair[0].encode(pair[1], errors="ignore")
    ),
)


@given(suffix=st.sampled_from([".txt", ".lyrics.txt", ".caption.txt", ".lrc", ".json", ".csv"]), content=contents)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_a_sidecar_give_a_value_or_a_problem(tmp_path, suffix, content):
    song(tmp_path / "song.wav") if not (tmp_path / "song.wav").exists() else None
    path = write(tmp_path / f"song{suffix}", content)
    found = scan(tmp_path)
    path.unlink()
    (track,) = found.tracks
    check(track)
    printed = shown(found)
    assert not any(ord(char) < 32 and char != "\n" or 127 <= ord(char) < 160 for char in printed)


@given(content=contents | st.lists(records | values, max_size=4).map(lambda samples: json.dumps(samples).encode()))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_a_dataset_json_give_tracks_or_one_sentence(tmp_path, content):
    song(tmp_path / "song.wav") if not (tmp_path / "song.wav").exists() else None
    path = write(tmp_path / "d.json", content)
    try:
        found = read_dataset_json(path)
    except UserError as error:
        assert "d.json" in str(error) and "\n" not in str(error)
        return
    assert len(found.tracks) <= 4 and shown(found)


@given(records)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_record_in_a_dataset_json_survives_the_round_trip(tmp_path, record):
    song(tmp_path / "song.wav") if not (tmp_path / "song.wav").exists() else None
    path = tmp_path / "d.json"
    path.write_text(json.dumps([record | {"audio_path": "song.wav"}]), encoding="utf-8")
    if "NaN" in path.read_text("utf-8") or "Infinity" in path.read_text("utf-8"):
        return
    first = read_dataset_json(path).tracks
    check(first[0])
    write_dataset_json(first, path)
    assert [told(track) for track in read_dataset_json(path).tracks] == [told(track) for track in first]


def test_claims_name_their_file(tmp_path):
    write(tmp_path / "song.json", {"bpm": 90, "duration": 3})
    claims, problems = read_claims("song", {"song.json": tmp_path / "song.json"})
    assert [(claim.field, claim.source, claim.kind) for claim in claims] == [("bpm", "song.json", ".json")]
    assert problems == [] and file_key("É.WAV") == file_key("e\u0301.wav")
