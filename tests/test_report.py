"""Pictures of songs, and the report of a folder."""

import html.parser
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from acestep_lora import pages, pictures
from acestep_lora.annotate import record
from acestep_lora.annotate.report import clock, remarks, signature, write_report
from acestep_lora.data.audio import AudioError
from acestep_lora.data.track import Scan, scan
from acestep_lora.pages import Card, Section

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data/demo"
HOSTILE = "</pre><script>alert(1)</script><img src='http://evil.example/x' onerror=alert(1)> {{ 7*7 }} \" '"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


def wave(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    soundfile.write(path, samples, rate)
    return path


def tone(hertz: float, seconds: float, rate: int = 16_000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def pixels(picture: pictures.Picture) -> np.ndarray:
    """Palette entries [height, width]."""
    return np.array(Image.open(io.BytesIO(picture.png)))


# ---------------------------------------------------------------- pictures


def test_a_picture_shows_when_it_is_loud_and_how_high_it_is(tmp_path):
    silence = np.zeros(16_000)
    song = np.concatenate([silence, tone(200, 1), silence, tone(6000, 1)])
    image = pixels(pictures.draw(wave(tmp_path / "a.wav", song), width=80, bands=40))
    assert image.shape == (80, 80)
    bars, mel = (image[:40] == 1).sum(axis=0), image[40:][::-1].astype(int)  # from the lowest band up
    quiet, low, high = slice(2, 18), slice(22, 38), slice(62, 78)
    assert bars[quiet].max() <= 2 and bars[low].min() >= 18 and bars[high].min() >= 18
    assert mel[:, quiet].max() == 2  # the darkest
    assert (mel[:, low].argmax(axis=0) < 10).all() and (mel[:, high].argmax(axis=0) > 30).all()


def test_a_picture_is_small_whatever_it_shows(tmp_path):
    rng = np.random.default_rng(0)
    for seconds in (0.6, 60):
        noise = rng.uniform(-1, 1, round(seconds * 16_000)) * np.repeat(rng.uniform(0, 1, round(seconds * 160)), 100)
        assert len(pictures.draw(wave(tmp_path / "noise.wav", noise)).png) < 12_000


def test_the_digest_is_of_the_sound(tmp_path):
    song = (32767 * tone(440, 1)).astype(np.int16)
    flac = pictures.draw(wave(tmp_path / "b.flac", song))
    assert pictures.draw(wave(tmp_path / "a.wav", song)).digest == flac.digest
    assert pictures.draw(wave(tmp_path / "c.wav", song // 2)).digest != flac.digest
    assert flac.seconds == pytest.approx(1)


def test_what_is_no_audio_has_no_picture(tmp_path):
    (tmp_path / "a.wav").write_text("not a wave")
    with pytest.raises(AudioError, match="a.wav"):
        pictures.draw(tmp_path / "a.wav")


# ---------------------------------------------------------------- report


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "songs, mine"
    folder.mkdir()
    for song in ("copper_rain", "glass_garden", "slow_orbit"):
        for file in DEMO.glob(f"{song}.*"):
            shutil.copy(file, folder)
    shutil.copy(folder / "slow_orbit.opus", folder / "slow orbit #2 日本.opus")
    wave(folder / "hostile.wav", tone(100, 1))
    record.save(folder / "hostile.wav", {"caption": HOSTILE, "lyrics": HOSTILE, "custom_tag": HOSTILE}, reviewed=True)
    (folder / "broken.mp3").write_bytes(b"\0" * 4000)
    (folder / "empty<b>.mp3").write_bytes(b"")
    provenance = {"bpm": {"kind": "estimator", "provider": "librosa", "version": "1", "confidence": 0.9}}
    record.save(folder / "copper_rain.ogg", {"bpm": 116}, provenance=provenance)
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    path = write_report(scan(folder), folder.parent / "report.html")
    return Page(path.read_text(encoding="utf-8"))


def test_every_song_is_there_problems_first(page, folder):
    cards = page.text.split("Those with problems come first.")[1]
    places = [cards.index(track.id) for track in scan(folder).tracks if track.id != "glass_garden.mp3"]
    assert len(places) == 5 and max(places) < cards.index("glass_garden.mp3")
    assert "'broken.mp3'" in cards  # cannot be decoded, and is listed with the reason
    assert "not reviewed: bpm" in cards and "A dark, glassy kalimba ballad" in cards and "6/8" in cards


def test_links_lead_to_the_songs_and_to_nowhere_else(page, folder):
    links = page.attributes("audio", "src")
    assert len(links) == 6 and "songs%2C%20mine/slow%20orbit%20%232%20%E6%97%A5%E6%9C%AC.opus" in links
    assert all(re.match(r"songs%2C%20mine/[^/:#?]+$", link) for link in links)
    assert all(link.startswith("data:image/png;base64,") for link in page.attributes("img", "src"))
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert any("default-src 'none'" in content for content in page.attributes("meta", "content"))


def test_nothing_a_song_says_is_markup(page):
    assert page.text.count("alert(1)") >= 6 and "{{ 7*7 }}" in page.text and "49" not in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert ("b", {}) in page.tags and "empty<b>.mp3" in page.text  # the bars' numbers are <b>; the file's name is text


def test_the_summary_counts(page):
    before = page.text.split("Songs\n")[0]
    assert re.search(r"songs\s*6\s*duration", before) and re.search(r"files left out\s*1", before)
    assert re.search(r"Duplicates[^=]*slow orbit #2 日本.opus, slow_orbit.opus", before)
    assert re.search(r"70-79\s*1\s*110-119\s*1\s*\?\s*4", before)


def test_size_per_song_is_bounded(folder):
    found = scan(folder)
    one = write_report(Scan(found.tracks[:1], []), folder.parent / "one.html").stat().st_size
    many = write_report(Scan(found.tracks[:1] * 5, []), folder.parent / "many.html").stat().st_size
    assert (many - one) / 4 < 15_000


def test_a_folder_without_songs_is_a_page_too(tmp_path):
    text = write_report(scan(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"songs\s*0", Page(text).text)


def test_a_report_replaces_the_old_one_or_leaves_it(folder, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(pictures, "draw", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(scan(folder), path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "old"


def test_remarks_say_what_is_missing(folder):
    told = {track.id: remarks(track) for track in scan(folder).tracks}
    assert told["glass_garden.mp3"] == []
    assert "without BPM, key, signature, language" in told["hostile.wav"]
    (folder / "broken.json").write_text("{")
    assert any(
        "broken.json" in remark for remark in remarks(next(t for t in scan(folder).tracks if t.id == "broken.mp3"))
    )
    (folder / "broken.json").unlink()


def test_a_page_of_anything(tmp_path):
    cards = [Card("a clip", audio="a.wav", fields={"seed": "1"}, texts={"prompt": "<i>"})]
    sections = [Section("runs", "a note", {"loss": {"low": 1}}, [("name", "loss"), ("lora", "0.1")], cards)]
    page = Page(pages.write_page(tmp_path / "p.html", "Sweep", {"jobs": "3"}, sections).read_text(encoding="utf-8"))
    for text in ("Sweep", "jobs", "a note", "low", "lora", "a clip", "seed", "<i>"):
        assert text in page.text
    assert page.attributes("audio", "src") == ["a.wav"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3601, "1:00:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_signature():
    assert [signature(numerator) for numerator in ("", "2", "3", "4", "6")] == ["?", "2/4", "3/4", "4/4", "6/8"]
