"""The studio: what becomes of edits, what the page lets out, and the page itself in a real browser."""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from acestep_lora.annotate import record
from acestep_lora.annotate.provider import Answer, Line, ProviderError
from acestep_lora.conditioning import Conditioning
from acestep_lora.data.track import read_dataset_json, scan
from acestep_lora.errors import UserError
from acestep_lora.studio.review import FIELDS, Form, Refused, Review, Settings

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data/demo"
CSV_SONG, LYRIC_SONG, BARE_SONG = "copper_rain.ogg", "little_harbour.wav", "night-walk_music-box.mp3"
HOSTILE = "<img src=x onerror=window.hacked=1> ${window.hacked=1} {{value}} \"'>"


class Heard:
    """A transcriber that hears two lines, in a song called anything but night."""

    kind, name, version, fields, paid = "transcriber", "heard", "1", ("lyrics", "language", "bpm"), False

    def annotate(self, track):
        if track.id.startswith("night"):
            raise ProviderError(f"{track.id} holds no voice: try another song.")
        lines = (Line(1.0, 2.0, "harbour lights aglow"), Line(3.0, 4.0, "wait for me bellow"))
        text = "\n".join(line.text for line in lines)
        return Answer({"lyrics": text, "language": "en", "bpm": 63}, {"bpm": 0.5}, lines, ("two lines",))


@pytest.fixture(scope="session")
def tokenizer(nano):
    return AutoTokenizer.from_pretrained(nano.tokenizer, local_files_only=True)


@pytest.fixture
def songs(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "songs", ignore=shutil.ignore_patterns(".*")))


@pytest.fixture
def review(songs, tokenizer) -> Review:
    return Review(songs, Conditioning(), tokenizer, {"heard": Heard}, songs / "dataset.json")


def track_of(folder: Path, song: str):
    return next(track for track in scan(folder).tracks if track.id == song)


# ---------------------------------------------------------------- editing


def test_edits_are_a_persons_and_beat_a_contradicting_csv(review, songs):
    assert track_of(songs, CSV_SONG).bpm == 116  # the CSV's
    review.save(review.open(CSV_SONG)._replace(bpm="58", keyscale="8B", timesignature="3/4"))
    for track in (track_of(songs, CSV_SONG), review.track(CSV_SONG)):
        assert (track.bpm, track.keyscale, track.timesignature) == (58, "C major", "3")
    assert json.loads((songs / "copper_rain.json").read_text())["reviewed"] == ["bpm", "keyscale", "timesignature"]
    assert any("wins over key_bpm.csv" in problem for problem in track_of(songs, CSV_SONG).problems)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"bpm": "999"}, "bpm '999' is not a number from 30 to 300"),
        ({"keyscale": "H major"}, "keyscale 'H major' is not a key"),
        ({"timesignature": "5/4"}, "timesignature '5/4' is not 2/4"),
        ({"language": "klingon"}, "language 'klingon' is not one of"),
        ({"is_instrumental": True, "lyrics": "la la"}, "instrumental is ticked, so these lyrics would not be used"),
    ],
)
def test_bad_values_are_refused_with_a_reason_and_nothing_is_written(review, songs, edit, reason):
    before = {path: path.read_bytes() for path in songs.iterdir()}
    form = review.open(LYRIC_SONG)._replace(caption="new", **edit)
    with pytest.raises(Refused, match=re.escape(reason)):
        review.save(form)
    assert {path: path.read_bytes() for path in songs.iterdir()} == before


def test_saving_an_untouched_song_writes_nothing(review, songs):
    before = {path: path.read_bytes() for path in songs.iterdir()}
    for song in review.tracks:
        review.save(review.open(song))
    assert {path: path.read_bytes() for path in songs.iterdir()} == before


def test_every_song_reads_back_as_it_was_after_save_as_reviewed(review, songs):
    was = {track.id: track for track in scan(songs).tracks}
    for song in was:
        review.save(review.open(song), reviewed=True)
        assert review.is_reviewed(review.track(song))
    fields = [*FIELDS, "duration", "repeat", "has_caption"]
    for track in scan(songs).tracks:
        assert [getattr(track, name) for name in fields] == [getattr(was[track.id], name) for name in fields]


def test_emptied_fields_stay_empty_whatever_other_files_say(review, songs):
    review.save(review.open("morning_tide.mp3")._replace(caption="", lyrics="", language="unknown"))
    track = track_of(songs, "morning_tide.mp3")
    assert not track.has_caption and track.is_instrumental and track.language == "unknown"
    assert (songs / "morning_tide.lyrics.txt").read_bytes() == (DEMO / "morning_tide.lyrics.txt").read_bytes()


def test_instrumental_hides_lyrics_and_gives_them_back(review, songs):
    form = review.open(LYRIC_SONG)._replace(is_instrumental=True)
    assert "[Instrumental]" in review.preview(form, Settings()) and "Harbour" not in review.preview(form, Settings())
    form = review.save(review.save(form), reviewed=True)
    assert form.is_instrumental and form.lyrics == "" and track_of(songs, LYRIC_SONG).is_instrumental
    assert "Harbour" in review.save(form._replace(is_instrumental=False)).lyrics


@pytest.mark.parametrize("suffix", [".json", ".caption.txt"])
def test_a_file_changed_meanwhile_is_a_conflict_and_both_edits_survive(review, songs, suffix):
    song = "slow_orbit.opus"
    form = review.open(song)._replace(bpm="80", genre="waltz")
    content = '{"language": "fr", "bpm": 90}' if suffix == ".json" else "another caption"
    (songs / f"slow_orbit{suffix}").write_text(content)
    with pytest.raises(record.Conflict, match="slow_orbit.opus was changed on disk meanwhile: .* is now"):
        review.save(form)
    assert (songs / f"slow_orbit{suffix}").read_text() == content
    merged = review.merge(form)
    assert review.drafts[song] == merged and (merged.bpm, merged.genre) == ("80", "waltz")
    review.save(merged)
    track = track_of(songs, song)
    assert (track.bpm, track.genre) == (80, "waltz")
    assert track.language == "fr" if suffix == ".json" else track.caption == "another caption"


def test_two_windows_on_one_song(review):
    one, other = review.open(LYRIC_SONG), review.open(LYRIC_SONG)
    review.save(one._replace(bpm="63"))
    with pytest.raises(record.Conflict, match="bpm is now '63'"):
        review.save(other._replace(bpm="125"))
    assert review.track(LYRIC_SONG).bpm == 63


def test_two_windows_saving_at_once_never_both_win(review):
    outcomes, gate, form = [], threading.Barrier(8), review.open(LYRIC_SONG)

    def save(bpm: int) -> None:
        gate.wait()
        try:
            review.save(form._replace(bpm=str(bpm)))
            outcomes.append(bpm)
        except record.Conflict:
            pass

    threads = [threading.Thread(target=save, args=(60 + i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [review.track(LYRIC_SONG).bpm]


def test_drafts_wait_until_they_are_saved_or_discarded(review, songs):
    form = review.open(CSV_SONG)._replace(caption="half a sent")
    review.keep(form)
    review.rescan()
    assert review.open(CSV_SONG) == form
    assert [row[1] for row in review.rows() if row[0] == CSV_SONG] == ["unsaved"]
    with pytest.raises(UserError, match="unsaved edits of copper_rain.ogg"):
        review.write_dataset(Settings())
    review.keep(review.read(CSV_SONG))  # typed back to what it was
    assert not review.drafts
    review.keep(form)
    assert review.discard(form).caption.startswith("Falling kalimba") and not review.drafts


def test_a_window_older_than_the_server_loses_nothing(review):
    form = review.open(CSV_SONG)._replace(version="of another process", caption="typed before")
    with pytest.raises(record.Conflict):
        review.save(form)
    assert review.merge(form).caption == "typed before"


def test_broken_json_is_not_written_over(review, songs):
    (songs / "copper_rain.json").write_text("{broken")
    with pytest.raises(UserError, match="copper_rain.json"):
        review.discard(Form(CSV_SONG))
    assert (songs / "copper_rain.json").read_text() == "{broken"
    assert "copper_rain.json" in next(row for row in review.rows() if row[0] == CSV_SONG)[2]


def test_songs_with_remarks_come_first(review):
    remarked = [bool(row[2]) for row in review.rows()]
    assert any(remarked) and not all(remarked) and remarked == sorted(remarked, reverse=True)


# ---------------------------------------------------------------- providers


def test_a_provider_fills_the_form_and_corrected_words_keep_their_times(review, songs):
    form, answer = review.ask(review.open(LYRIC_SONG), "heard")
    assert (form.lyrics, form.bpm) == ("harbour lights aglow\nwait for me bellow", "63") and answer.problems
    assert review.drafts[LYRIC_SONG] == form and track_of(songs, LYRIC_SONG).bpm == 126  # not saved yet
    review.save(form._replace(lyrics="[Verse]\nHarbour lights aglow,\nwait for me below"))
    first, second = [line for line in record.read_lines(songs / LYRIC_SONG) if not line.text.startswith("[")]
    assert first == Line(1.0, 2.0, "Harbour lights aglow,") and second[::2] == (3.0, "wait for me below")
    assert record.read(songs / LYRIC_SONG).is_reviewed("lyrics")


def test_a_provider_that_fails_leaves_the_form_alone(review):
    with pytest.raises(ProviderError, match="holds no voice"):
        review.ask(review.open(BARE_SONG), "heard")
    with pytest.raises(UserError, match="no provider 'nobody'"):
        review.ask(review.open(BARE_SONG), "nobody")
    assert not review.drafts


# ---------------------------------------------------------------- what the model will see


def test_the_preview_is_what_training_builds(review, songs):
    form = review.open("glass_garden.mp3")._replace(bpm="75", lyrics="la la", language="fr")
    text = review.preview(form, Settings("mytag", "append", 20))
    review.save(form)
    track = next(t for t in scan(songs, custom_tag="mytag", tag_position="append").tracks if t.id == form.song)
    words = review.conditioning
    for name, (prompt, instruction) in words.variants(track).items():
        exact = words.prompt(track, prompt, instruction, track.duration)
        count = len(review.tokenizer(exact).input_ids)
        share = {"caption": 80, "genre": 20}[name]
        assert f"--- {name}, in {share} % of the draws, {count} of 256 tokens ---\n{exact}" in text
    assert text.endswith(f"of 2048 tokens ---\n{words.lyrics(track)}")


def test_too_long_a_caption_is_told_and_the_metas_stay(review):
    form = review.open(CSV_SONG)._replace(caption="Warm pads. " * 200, prompt_override="genre")
    text = review.preview(form, Settings())
    assert "too long" in text and "- bpm: 116\n" in text and text.count("Warm pads.") < 200
    with pytest.raises(Refused, match="bpm"):
        review.preview(form._replace(bpm="fast"), Settings())


def test_dataset_json_holds_edits_and_settings_and_keeps_what_was_there(review, songs):
    (songs / "dataset.json").write_text("precious")
    review.save(review.open(CSV_SONG)._replace(bpm="58"))
    path = review.write_dataset(Settings("mytag", "replace", 30))
    read = read_dataset_json(path)
    assert (read.custom_tag, read.tag_position, read.genre_ratio) == ("mytag", "replace", 30)
    assert {track.id: track.bpm for track in read.tracks}[CSV_SONG] == 58 and len(read.tracks) == 8
    assert [copy.read_text() for copy in (songs / record.BACKUP).glob("dataset.*")] == ["precious"]


# ---------------------------------------------------------------- what the page lets out


@pytest.fixture
def client(review):
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    from acestep_lora.studio.page import app

    return TestClient(app(review, Settings(), "127.0.0.1"), base_url="http://127.0.0.1")


def test_only_songs_and_pictures_can_be_fetched(client, songs):
    assert client.get(f"/song/{CSV_SONG}").content == (songs / CSV_SONG).read_bytes()
    part = client.get(f"/song/{CSV_SONG}", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == (songs / CSV_SONG).read_bytes()[10:20]
    assert client.get(f"/picture/{CSV_SONG}").content.startswith(b"\x89PNG")
    sibling, gradio = songs / "README.md", "/gradio_api/file="
    routes = [f"{gradio}{sibling}", f"{gradio}{songs / CSV_SONG}", f"{gradio}/etc/passwd", "/file=/etc/passwd"]
    routes += ["/song/README.md", "/song/..%2FREADME.md", f"/song/{sibling}", "/song/%2Fetc%2Fpasswd"]
    routes += [f"/gradio_api/%66ile={sibling}", "/gradio_api/file=http://127.0.0.1/", "/gradio_api/proxy=http://x/"]
    routes += ["/static/../../../../../etc/passwd", f"/assets/..%2f..%2f{sibling}", f"/{sibling}", "/picture/..%2Fa"]
    for route in routes:
        answer = client.get(route, follow_redirects=False)
        assert answer.status_code >= 400, route
        assert sibling.read_bytes() not in answer.content and b"root:" not in answer.content
    upload = client.post("/gradio_api/upload", files={"files": ("a.txt", b"a")})
    assert upload.status_code == 403


def test_a_link_dressed_up_as_a_song_is_not_served(client, review, songs, tmp_path):
    (tmp_path / "secret").write_text("root:")
    (songs / "evil.wav").symlink_to(tmp_path / "secret")
    review.rescan()
    assert "evil.wav" in review.tracks and client.get("/song/evil.wav").status_code == 404


def test_a_site_that_points_its_own_name_here_is_turned_away(client):
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get(f"/song/{CSV_SONG}", headers={"Host": "evil.example:7860"}).status_code == 400
    assert client.get("/").status_code == 200


def test_page_has_no_analytics_and_no_public_calls(client):
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert {call["api_visibility"] for call in config["dependencies"]} == {"private"}
