"""annotate.py: what is asked, what is written beside the songs, and that neither failures nor kills lose anything."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import services
import soundfile
from builders import write_songs
from services import SECRET, WRONG_KEY, chat, gemini, whisper

import annotate
from acestep_lora import cli
from acestep_lora.annotate import record, remote
from acestep_lora.annotate.annotator import Annotator, Report, disagreements, unreviewed
from acestep_lora.annotate.folder import process_folder
from acestep_lora.annotate.provider import Answer, Line, ProviderDown, ProviderError
from acestep_lora.annotate.structure import Structure
from acestep_lora.annotate.transcribers import Lrc, WhisperAPI
from acestep_lora.data.track import Track, scan
from acestep_lora.errors import UserError


def song(path: Path, seconds: float = 0.6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(8000 * seconds)), 8000)
    return path


def put(path: Path, content: str | dict) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass
class Estimator:
    """Says the same of every song, and counts how often it was asked."""

    answer: Answer
    kind: str = "estimator"
    name: str = "estimate"
    version: str = "1"
    fields: tuple[str, ...] = ("bpm", "keyscale", "timesignature")
    paid: bool = False
    calls: int = 0
    raises: dict | None = None  # track id -> error

    def annotate(self, track: Track) -> Answer:
        self.calls += 1
        if error := (self.raises or {}).get(track.id):
            raise error
        return self.answer


def estimator(**values) -> Estimator:
    return Estimator(Answer(values, {"bpm": 0.9}))


def run(folder: Path, *providers, policy="fill") -> Report:
    return Annotator(policy).run(list(providers), lambda: scan(folder))


def problems(folder: Path, report: Report | None = None) -> dict[str, str]:
    return {track.id: "; ".join(track.problems) for track in (report or Report()).onto(scan(folder)).tracks}


# ---------------------------------------------------------------- the record


def test_a_persons_value_is_reviewed_and_beats_a_machine_and_a_table(tmp_path):
    path = song(tmp_path / "a.wav")
    source = {"kind": "estimator", "provider": "estimate", "version": "1", "confidence": 0.9}
    found = record.save(path, {"bpm": 90}, provenance={"bpm": source})
    assert found.data == {"bpm": 90, "provenance": {"bpm": source}}
    found = record.save(path, {"bpm": 120}, reviewed=True, expected=found.digest)
    assert found.data == {"bpm": 120, "reviewed": ["bpm"]}
    put(tmp_path / "table.csv", "File,BPM\na.wav,60\n")
    assert scan(tmp_path).tracks[0].bpm == 120
    found = record.save(path, {"bpm": 90, "genre": "pop"}, provenance={"bpm": source, "genre": source})
    assert (found.value("bpm"), found.value("genre")) == (120, "pop")
    assert record.save(path, {"genre": ""}, reviewed=True).data["genre"] is None


def test_what_others_wrote_into_the_json_stays(tmp_path):
    path = song(tmp_path / "a.wav")
    text = '\ufeff{"Tempo": 100, "artist": {"name": "歌"}, "caption": "x", "reviewed": true}'
    put(tmp_path / "a.json", text)
    found = record.save(path, {"bpm": 120}, reviewed=["bpm"])
    assert found.data == {"artist": {"name": "歌"}, "caption": "x", "reviewed": True, "bpm": 120}
    (backup,) = (tmp_path / record.BACKUP).iterdir()
    assert backup.read_text(encoding="utf-8") == text
    record.save(path, {"bpm": 120}, reviewed=["bpm"])
    assert len(list((tmp_path / record.BACKUP).iterdir())) == 1  # nothing changed, nothing kept
    assert [track.id for track in scan(tmp_path).tracks] == ["a.wav"]


def test_a_change_by_somebody_else_is_a_conflict(tmp_path):
    path = song(tmp_path / "a.wav")
    opened = record.read(path)
    record.save(path, {"bpm": 90}, expected=None)
    with pytest.raises(record.Conflict, match="changed by somebody else"):
        record.save(path, {"bpm": 91}, expected=opened.digest)
    assert record.read(path).value("bpm") == 90


@pytest.mark.parametrize("values", [{"bpm": 999}, {"keyscale": "H"}, {"language": "klingon"}, {"tempo": 90}])
def test_bad_values_are_refused_by_name(tmp_path, values):
    path = song(tmp_path / "a.wav")
    with pytest.raises(UserError, match=next(iter(values))):
        record.save(path, {"caption": "fine", **values})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"reviewed": 1}', '{"provenance": [1]}', '{"checks": {"bpm": 1}}', '{"bpm": NaN}']
)
def test_a_json_that_cannot_be_read_is_not_written(tmp_path, text):
    path = song(tmp_path / "a.wav")
    put(tmp_path / "a.json", text)
    with pytest.raises(UserError, match="mend it or move it away"):
        record.save(path, {"bpm": 90})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text
    report = run(tmp_path, estimator(bpm=90), Lrc())
    assert len(report.failed["a.wav"]) == 1


def test_sidecars_are_found_however_the_disk_spells_them(tmp_path):
    path = song(tmp_path / "が é.v2.wav")
    decomposed = tmp_path / "か\u3099 e\u0301.v2.json"
    put(decomposed, {"bpm": 90})
    record.save(path, {"genre": "pop"})
    assert load(decomposed) == {"bpm": 90, "genre": "pop"} and len(list(tmp_path.glob("*.json"))) == 1


def test_lines_are_read_back(tmp_path):
    path, lines = song(tmp_path / "a.wav"), (Line(0.5, 1.0, "歌う"), Line(2.0, None, "x"))
    record.save(path, {"language": "ja"}, lines=lines)
    assert record.read_lines(path) == lines and load(tmp_path / "a.lyrics.json")["language"] == "ja"
    for bad in ("[]", '{"lines": [{"start": "x", "text": "y"}]}', '{"lines": [{"start": 1, "text": null}]}'):
        put(tmp_path / "a.lyrics.json", bad)
        with pytest.raises(UserError, match="lines with start, end and text"):
            record.read_lines(path)


# ---------------------------------------------------------------- what is asked and written


def test_only_what_is_missing_is_filled_and_once(tmp_path):
    song(tmp_path / "a.wav")
    song(tmp_path / "b.wav")
    put(tmp_path / "a.json", {"bpm": 100, "mine": 1})
    provider = estimator(bpm=120, keyscale="Dm")
    report = run(tmp_path, provider)
    assert load(tmp_path / "a.json") == {
        "bpm": 100,
        "mine": 1,
        "keyscale": "D minor",
        "provenance": {"keyscale": {"kind": "estimator", "provider": "estimate", "version": "1"}},
    }
    assert load(tmp_path / "b.json")["provenance"]["bpm"]["confidence"] == 0.9
    assert report.asked == report.filled == {"estimate": 2} and not report.failed
    again = estimator(bpm=121, keyscale="C", timesignature="3")
    run(tmp_path, again)
    assert (again.calls, record.read(tmp_path / "a.wav").value("bpm")) == (2, 100)  # the signature was open
    run(tmp_path, again)
    assert again.calls == 2


def test_an_answer_that_was_paid_for_is_not_asked_for_again_even_if_it_was_empty(tmp_path):
    song(tmp_path / "a.wav")
    for paid, calls in ((False, 2), (True, 1)):
        provider = replace(estimator(), paid=paid)
        run(tmp_path, provider)
        run(tmp_path, provider)
        assert provider.calls == calls


def test_check_compares_and_changes_nothing(tmp_path):
    song(tmp_path / "a.wav")
    put(tmp_path / "table.csv", "File,BPM,Key\na.wav,92,Db major\n")
    provider = estimator(bpm=184, keyscale="C# major", timesignature="4")
    report = run(tmp_path, provider, policy="check")
    assert problems(tmp_path, report) == {"a.wav": "bpm: estimate says 184 (double), not 92, and is 90% sure"}
    (track,) = scan(tmp_path).tracks
    assert (track.bpm, track.keyscale, track.timesignature) == (92, "Db major", "4")
    run(tmp_path, provider, policy="check")
    assert provider.calls == 1 and disagreements(track)  # it is still told, from the JSON
    put(tmp_path / "table.csv", "File,BPM,Key\na.wav,184,Db major\n")
    assert not disagreements(*scan(tmp_path).tracks)


def test_overwrite_replaces_what_the_json_holds_but_nothing_reviewed_and_no_other_file(tmp_path):
    for name in "abc":
        song(tmp_path / f"{name}.wav")
    put(tmp_path / "a.json", {"bpm": 90, "caption": "mine"})
    put(tmp_path / "b.json", {"bpm": 90, "reviewed": ["bpm"]})
    put(tmp_path / "table.csv", "File,BPM\nc.wav,90\n")
    provider = estimator(bpm=120)
    report = run(tmp_path, provider, policy={"bpm": "overwrite"})
    assert [track.bpm for track in scan(tmp_path).tracks] == [120, 90, 90]
    assert problems(tmp_path, report)["b.wav"] == problems(tmp_path, report)["c.wav"]
    assert problems(tmp_path, report)["c.wav"] == "bpm: estimate says 120, not 90, and is 90% sure"
    assert load(tmp_path / "a.json")["caption"] == "mine"
    assert any("90" in path.read_text(encoding="utf-8") for path in (tmp_path / record.BACKUP).glob("a.*"))


@pytest.mark.parametrize("policy", ["often", {"bpm": "often"}, {"tempo": "fill"}])
def test_a_policy_that_is_none_is_refused(policy):
    with pytest.raises(UserError, match="is not a field with one of fill, check, overwrite"):
        Annotator(policy)


def test_one_failing_song_and_one_provider_that_is_down_lose_nothing_else(tmp_path):
    for name in "abc":
        song(tmp_path / f"{name}.wav")
    failing = estimator(bpm=100)
    failing.raises = {"b.wav": ProviderError("cannot hear it")}
    down = Estimator(Answer({"caption": "x"}), kind="captioner", name="words", fields=("caption",))
    down.raises = {"b.wav": ProviderDown("the key was refused")}
    last = Estimator(Answer({"genre": "pop"}), kind="captioner", name="genres", fields=("genre",))
    report = run(tmp_path, failing, down, last)
    assert [track.bpm for track in scan(tmp_path).tracks] == [100, None, 100]
    assert [track.genre for track in scan(tmp_path).tracks] == ["pop"] * 3
    assert down.calls == 2 and [track.has_caption for track in scan(tmp_path).tracks] == [True, False, False]
    assert report.failed.keys() == {"b.wav"}
    assert problems(tmp_path, report)["b.wav"] == "estimate: cannot hear it; words stopped here: the key was refused"


# ---------------------------------------------------------------- lyrics


def test_lrc_files_give_times_and_language(tmp_path):
    song(tmp_path / "a.wav")
    put(tmp_path / "a.lrc", "[00:00.00][Verse 1]\n[00:00.10]君のうた\n[00:00.30]もう一度\n")
    report = run(tmp_path, Lrc())
    (track,) = scan(tmp_path).tracks
    assert track.language == "ja" and track.lyrics == "[Verse 1]\n君のうた\nもう一度"
    assert [line.text for line in record.read_lines(track.path)] == ["[Verse 1]", "君のうた", "もう一度"]
    assert report.filled == {"lrc": 1} and not run(tmp_path, Lrc()).asked
    put(tmp_path / "a.lrc", "[00:00.20]君のうた\n[00:00.50]さようなら\n")
    run(tmp_path, Lrc())
    assert [line.start for line in record.read_lines(track.path)] == [
        0.2,
        0.5,
    ]  # the old times were not of these lyrics


def test_times_of_an_lrc_go_to_the_lyrics_that_win(tmp_path):
    song(tmp_path / "a.wav")
    put(tmp_path / "a.lyrics.txt", "[Chorus]\nHarbour lights aglow\nwait for me below")
    put(tmp_path / "a.lrc", "[00:00.10]harbor lights aglow\n[00:00.40]wait for me bellow\n")
    run(tmp_path, Lrc())
    lines = record.read_lines(tmp_path / "a.wav")
    assert [line.text for line in lines] == ["[Chorus]", "Harbour lights aglow", "wait for me below"]
    assert lines[2][:2] == (0.4, None) and not run(tmp_path, Lrc()).filled["lrc"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with services.serve() as found:
        yield found


def whisper_api(server) -> WhisperAPI:
    return WhisperAPI(True, remote.OpenAI("whisper-1", base_url=f"{server.url}/v1"))


def test_a_transcript_waits_for_review(tmp_path, server):
    path = song(tmp_path / "a.wav")
    put(song(tmp_path / "b.wav").with_suffix(".json"), {"is_instrumental": True})
    put(song(tmp_path / "c.wav").with_suffix(".lyrics.txt"), "given")
    server.answers = [(200, whisper("We are the stars."))]
    report = run(tmp_path, whisper_api(server), Lrc())
    tracks = scan(tmp_path).tracks
    assert report.asked["whisper_api"] == len(server.requests) == 1  # neither the instrumental nor the given lyrics
    assert (tracks[0].lyrics, tracks[0].language) == ("We are the stars", "en")
    assert record.read_lines(path) == (Line(0.0, 1.6, "We are the stars"),)
    assert [track.id for track in unreviewed(tracks, "lyrics")] == ["a.wav"]
    record.save(path, {"lyrics": "We are the starts"}, reviewed=True)
    assert not unreviewed(scan(tmp_path).tracks, "lyrics")
    run(tmp_path, whisper_api(server), policy="overwrite")
    assert scan(tmp_path).tracks[0].lyrics == "We are the starts"


def test_nobody_sings_is_an_answer(tmp_path, server):
    song(tmp_path / "a.wav")
    server.answers = [(200, whisper("") | {"segments": [], "words": []})]
    run(tmp_path, whisper_api(server))
    run(tmp_path, whisper_api(server))
    assert load(tmp_path / "a.json")["lyrics"] == "[Instrumental]" and len(server.requests) == 1


def test_a_transcript_is_compared_with_given_lyrics_and_times_them(tmp_path, server):
    put(song(tmp_path / "a.wav").with_suffix(".lyrics.txt"), "We are the stars\ntonight")
    put(song(tmp_path / "b.wav").with_suffix(".lyrics.txt"), "Something else entirely here")
    server.answers = [(200, whisper("We are the stars. Tonight!"))]
    report = run(tmp_path, whisper_api(server), policy={"lyrics": "check"})
    assert [line.start for line in record.read_lines(tmp_path / "a.wav")] == [0.0, 1.6]
    assert not (tmp_path / "b.lyrics.json").exists()
    assert problems(tmp_path, report) == {
        "a.wav": "",
        "b.wav": "lyrics: whisper_api hears 0% of the words given, and is 78% sure",
    }


@pytest.mark.parametrize("place", [".lyrics.txt", ".lrc", ".json"])
def test_structure_tags_go_where_the_lyrics_are(tmp_path, server, place):
    lines = "We are the stars\ntonight"
    content = {
        ".json": {"lyrics": lines, "reviewed": ["lyrics"]},
        ".lrc": "[00:01.00]We are the stars\n[00:02.00]tonight",
    }
    before = put(song(tmp_path / "a.wav").with_suffix(place), content.get(place, lines)).read_bytes()
    provider = Structure("openai", remote.OpenAI("gpt", base_url=f"{server.url}/v1"), "Sections?", True)
    server.answers = [(200, chat('{"sections": [{"line": 1, "name": "Chorus"}]}'))]
    report = run(tmp_path, provider)
    assert scan(tmp_path).tracks[0].lyrics == "[Chorus]\nWe are the stars\ntonight" and not report.failed
    if place != ".lrc":
        kept = [path.read_bytes() for path in (tmp_path / record.BACKUP).glob(f"a*{Path(place).suffix}")]
        assert before in kept
    assert record.read(tmp_path / "a.wav").is_reviewed("lyrics") == (place == ".json")
    run(tmp_path, provider)
    assert len(server.requests) == 1
    assert not unreviewed(scan(tmp_path).tracks, "lyrics")


def test_structure_never_changes_a_word(tmp_path):
    before = put(song(tmp_path / "a.wav").with_suffix(".lyrics.txt"), "We are the stars").read_bytes()
    liar = Estimator(Answer({"lyrics": "[Chorus]\nWe were the stars"}), kind="structure", fields=("structure",))
    report = run(tmp_path, liar)
    assert "changed the words" in report.failed["a.wav"][0]
    assert (tmp_path / "a.lyrics.txt").read_bytes() == before and not (tmp_path / "a.json").exists()


# ---------------------------------------------------------------- the tutorial's scripts


def test_a_folder_is_transcribed_into_text_files(tmp_path, server):
    for name in ("b.wav", "a.wav", "deeper/c.wav"):
        song(tmp_path / "in" / name)
    put(tmp_path / "in/readme.txt", "no song")
    server.answers = [(500, {}), (200, whisper("We are the stars."))]
    service = remote.OpenAI("whisper-1", base_url=f"{server.url}/v1", retries=0)
    written = process_folder(tmp_path / "in", tmp_path / "out", provider=WhisperAPI(True, service))
    assert written == [tmp_path / "out/b.lyrics.txt"]  # a.wav failed
    written = process_folder(tmp_path / "in", tmp_path / "out", provider=WhisperAPI(True, service))
    assert written == [tmp_path / "out/a.lyrics.txt"] and len(server.requests) == 3  # b was there
    assert written[0].read_text(encoding="utf-8") == "We are the stars\n"
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.wav", "b.wav", "deeper", "readme.txt"]


def test_a_folder_is_captioned_by_the_name_of_a_provider(tmp_path):
    song(tmp_path / "in/a.wav", seconds=2)
    (written,) = process_folder(tmp_path / "in", tmp_path / "out", provider="rule_based")
    assert written == tmp_path / "out/a.caption.txt" and len(written.read_text(encoding="utf-8")) > 10
    with pytest.raises(UserError, match="whisper_api.*"):
        process_folder(tmp_path / "in", tmp_path / "out", provider="nobody")


# ---------------------------------------------------------------- the command


def test_the_command_fills_reports_and_ends_with_a_table(configure, tmp_path, capsys):
    put(song(tmp_path / "a.wav", 2).with_suffix(".lrc"), "[00:00.10]hello")
    cfg = configure("annotate", f"dataset.dir={tmp_path}", "tempo_key=none", "captioner=rule_based")
    assert annotate.main(cfg) == 0
    printed = capsys.readouterr().out
    assert "1 songs" in printed and "rule_based: asked about 1 songs" in printed
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8").lower()
    put(song(tmp_path / "b.wav").with_suffix(".json"), "{")
    assert annotate.main(cfg) == cli.LEFT_OUT
    with pytest.raises(UserError, match="dataset.dir is not set"):
        annotate.main(configure("annotate", "tempo_key=none"))


def test_policies_from_the_command_line(configure):
    assert configure("annotate", "policy=overwrite", "tempo_key=none").policy == "overwrite"
    cfg = configure("annotate", "policy.caption=overwrite", "tempo_key=none")
    assert (cfg.policy.caption, cfg.policy.bpm, cfg.policy.lyrics) == ("overwrite", "check", "fill")


def test_a_dry_run_lists_what_would_cost_and_writes_nothing(configure, tmp_path, capsys):
    song(tmp_path / "a.wav")
    put(song(tmp_path / "b.wav").with_suffix(".txt"), "words")
    before = sorted(tmp_path.iterdir())
    options = [
        f"dataset.dir={tmp_path}",
        "tempo_key=none",
        "transcriber=elevenlabs",
        "captioner=gemini",
        "dry_run=true",
    ]
    assert annotate.main(configure("annotate", *options)) == 0
    printed = capsys.readouterr().out
    assert "elevenlabs: 1 calls" in printed and "gemini: 2 calls" in printed and "  b.wav" in printed
    assert sorted(tmp_path.iterdir()) == before


def test_the_key_is_nowhere_to_be_read(tmp_path, configure, monkeypatch, capfd, caplog):
    """A key from .env is refused by the real command at its lowest log level, and accepted here."""
    song(tmp_path / "songs/a.wav")
    put(tmp_path / ".env", f"GEMINI_API_KEY={SECRET}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    with services.serve() as server:
        options = [
            "dataset.dir=songs",
            "tempo_key=none",
            "transcriber=gemini",
            f"transcriber.service.base_url={server.url}",
        ]
        server.answers = [WRONG_KEY["gemini"]]
        command = [sys.executable, str(cli.ROOT / "annotate.py"), "hydra.verbose=true", *options]
        refused = subprocess.run(command, capture_output=True)
        server.answers = [(200, gemini('{"language": "ja", "lyrics": "歌"}'))]
        with caplog.at_level(0):
            assert annotate.main(configure("annotate", *options)) == 0
        assert all(headers["x-goog-api-key"] == SECRET for _, headers, _ in server.requests)
    told = refused.stdout + refused.stderr
    assert refused.returncode == cli.LEFT_OUT, told.decode()
    assert b"status 401" in told and b"GEMINI_API_KEY" in told
    assert load(tmp_path / "songs/a.json")["lyrics"] == "歌"
    told += "".join((caplog.text, *capfd.readouterr())).encode()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".env")
    assert SECRET.encode() not in told + written


# ---------------------------------------------------------------- kills


def twelve(folder: Path) -> Path:
    for i in range(12):
        path = song(folder / f"song {i:02}.wav")
        put(path.with_suffix(".lrc"), f"[00:00.00]line one of {i}\n[00:00.30]歌う")
        if i % 3 == 0:
            put(path.with_suffix(".json"), {"bpm": 60 + i, "artist": f"歌手 {i}", "caption": "x" * 3000})
    return folder


def sidecars_of(folder: Path) -> dict[str, str]:
    """Every JSON's name and text; each must be whole."""
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json"))}
    for name, text in found.items():
        document = json.loads(text)
        assert (
            "lines" in document if name.endswith(".lyrics.json") else "artist" in document or "provenance" in document
        )
    return found


def annotate_twelve(folder: Path) -> None:
    run(folder, estimator(bpm=120, keyscale="D minor", timesignature="4"), Lrc(), policy="check")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork and kill -9")
def test_kills_at_any_moment_lose_nothing(tmp_path):
    annotate_twelve(twelve(tmp_path / "whole"))
    expected = sidecars_of(tmp_path / "whole")
    start = time.perf_counter()
    annotate_twelve(twelve(tmp_path / "timed"))
    seconds, draw, partial, died = time.perf_counter() - start, random.Random(0), 0, 0
    while died < 30:
        folder = twelve(tmp_path / "killed")
        process = multiprocessing.get_context("fork").Process(target=annotate_twelve, args=(folder,))
        process.start()
        time.sleep(draw.uniform(0, 0.8 * seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        died += process.exitcode == -signal.SIGKILL
        partial += sidecars_of(folder).keys() < expected.keys()
        annotate_twelve(folder)
        assert sidecars_of(folder) == expected
        shutil.rmtree(folder)
    assert partial >= 10


@pytest.mark.slow
def test_the_command_survives_kills(tmp_path):
    """The same with the real command, kept going in one folder: each run dies somewhere, the last one finishes."""
    command = [sys.executable, str(cli.ROOT / "annotate.py"), "captioner=rule_based", "report=null"]

    def start(folder: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, f"dataset.dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    began = time.perf_counter()
    assert start(twelve(tmp_path / "whole")).wait() == 0
    seconds, draw = time.perf_counter() - began, random.Random(0)
    folder = twelve(tmp_path / "killed")
    for _ in range(30):
        process = start(folder)
        time.sleep(draw.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.wait()
        sidecars_of(folder)
        if draw.random() < 0.3:  # from the beginning, so that later kills find work, too
            shutil.rmtree(folder)
            twelve(folder)
    assert start(folder).wait() == 0
    assert sidecars_of(folder) == sidecars_of(tmp_path / "whole")


def test_half_a_surrogate_in_a_json_survives(tmp_path):
    """Valid JSON that no UTF-8 file can hold unescaped: found by fuzzing."""
    song = tmp_path / "song.wav"
    song.touch()
    (tmp_path / "song.json").write_text('{"\\ud800": "\\udfff", "bpm": 90}', encoding="utf-8")
    assert record.save(song, {"bpm": 120}).data["\ud800"] == "\udfff"


@pytest.mark.parametrize("value", ["", "n/a", "fast", {}])
def test_a_check_without_a_value_is_no_disagreement(tmp_path, value):
    song = write_songs(tmp_path, 8000, count=1)[0]
    sidecar = {"bpm": 90, "checks": {"bpm": {"value": value, "provider": "x"}}}
    song.with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")
    assert disagreements(scan(tmp_path).tracks[0]) == []
