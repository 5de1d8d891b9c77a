"""The studio and the report in headless Chromium: pytest -m system tests/test_browser.py"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_studio import BARE_SONG, CSV_SONG, DEMO, HOSTILE, LYRIC_SONG, Heard, track_of
from transformers import AutoTokenizer

from acestep_lora.annotate.report import write_report
from acestep_lora.conditioning import Conditioning
from acestep_lora.data.track import read_dataset_json, scan
from acestep_lora.studio.review import Review, Settings

pytestmark = pytest.mark.system
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
PLAYED = "() => document.querySelector('audio').currentTime > 0.2"
SEEN = "() => { const i = document.querySelector('img'); return i && i.complete && i.naturalWidth > 300 }"


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studio") / "songs"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns(".*"))
    hostile = dict.fromkeys(("caption", "genre", "lyrics", "custom_tag"), HOSTILE) | {"bpm": HOSTILE}
    (folder / "slow_orbit.json").write_text(json.dumps(hostile), encoding="utf-8")
    (folder / "slow_orbit.caption.txt").unlink()
    (folder / "<img src=x onerror=window.hacked=1>.mp3").write_bytes((folder / "glass_garden.mp3").read_bytes())
    (folder / "<b>broken<b>.mp3").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def review(songs, nano) -> Review:
    tokenizer = AutoTokenizer.from_pretrained(nano.tokenizer, local_files_only=True)
    return Review(songs, Conditioning(), tokenizer, {"heard": Heard}, songs / "dataset.json")


@pytest.fixture(scope="module")
def site(review):
    import uvicorn

    from acestep_lora.studio.page import app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app(review, Settings(), "127.0.0.1"), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that fails its test if anything outside this machine is asked for or a script runs that is not ours."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    outside = [url for url in asked if not re.match(r"http://127\.0\.0\.1:|file:|data:|blob:", url)]
    hacked = page.evaluate("window.hacked")
    page.close()
    assert (outside, errors, hacked) == ([], [], None)


def choose(page, song: str) -> None:
    page.get_by_role("gridcell").get_by_text(song, exact=True).click()
    expect(page.locator("#player h2")).to_have_text(song)


def visit(page, site: str, song: str) -> None:
    page.goto(site)
    expect(page.locator("#player h2")).not_to_have_text("")
    choose(page, song)


def press(page, button: str, answer: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator("#message")).to_contain_text(answer)


def test_open_play_edit_save_reload(page, site, songs):
    visit(page, site, "glass_garden.mp3")
    page.wait_for_function(SEEN)
    page.locator("audio").evaluate("audio => { audio.muted = true; audio.play() }")
    page.wait_for_function(PLAYED)
    page.locator("#look").click(position={"x": 600, "y": 80})
    assert page.locator("audio").evaluate("audio => audio.currentTime / audio.duration") > 0.3
    page.get_by_label("Caption").fill("Glass and rain, kalimba")
    page.get_by_label("Key").fill("9A")
    page.get_by_label("Key").press("Enter")
    expect(page.locator("#preview textarea")).to_have_value(
        re.compile("Glass and rain, kalimba(.|\n)*- keyscale: E minor")
    )
    press(page, "Save as reviewed", "Saved and marked as reviewed.")
    track = track_of(songs, "glass_garden.mp3")
    assert (track.caption, track.keyscale, track.bpm) == ("Glass and rain, kalimba", "E minor", 72)
    visit(page, site, "glass_garden.mp3")
    expect(page.get_by_label("Caption")).to_have_value("Glass and rain, kalimba")
    expect(page.get_by_role("row").filter(has_text="glass_garden.mp3")).to_contain_text("reviewed")


def test_conflict_keeps_both_edits(page, site, songs):
    visit(page, site, CSV_SONG)
    page.get_by_label("Caption").fill("mine")
    (songs / "copper_rain.json").write_text('{"genre": "theirs"}')
    press(page, "Save", "changed on disk meanwhile: genre is now 'theirs'")
    expect(page.get_by_label("Caption")).to_have_value("mine")
    expect(page.get_by_label("Genre")).to_have_value("theirs")
    assert json.loads((songs / "copper_rain.json").read_text()) == {"genre": "theirs"}
    press(page, "Save", "Saved.")
    track = track_of(songs, CSV_SONG)
    assert (track.caption, track.genre, track.bpm) == ("mine", "theirs", 116)


def test_bad_values_are_refused_with_the_reason(page, site, songs):
    visit(page, site, "paper_lanterns.flac")
    page.get_by_label("BPM").fill("999")
    expect(page.locator("#preview textarea")).to_have_value(re.compile("cannot be saved: bpm '999'"))
    press(page, "Save", "bpm '999' is not a number from 30 to 300")
    assert track_of(songs, "paper_lanterns.flac").bpm == 80
    expect(page.get_by_label("BPM")).to_have_value("999")
    press(page, "Discard edits", "This is what the files say.")
    expect(page.get_by_label("BPM")).to_have_value("80")


def test_markup_is_shown_as_text(page, site, songs):
    visit(page, site, "slow_orbit.opus")
    for label in ("Caption", "Genre", "Lyrics"):
        expect(page.get_by_label(label, exact=True)).to_have_value(HOSTILE)
    expect(page.locator("#player li").first).to_contain_text("<img src=x")
    choose(page, "<img src=x onerror=window.hacked=1>.mp3")
    page.wait_for_timeout(500)
    assert page.locator("img[src=x]").count() == 0
    expect(page.get_by_text("<b>broken<b>.mp3: is empty")).to_be_visible()


def test_tap_half_and_double(page, site):
    visit(page, site, BARE_SONG)
    for _ in range(7):
        page.locator("#tap").click(no_wait_after=True)
        page.wait_for_timeout(500)
    expect(page.get_by_label("BPM")).to_have_value(re.compile(r"\d+"))
    tapped = int(page.get_by_label("BPM").input_value())
    assert 60 <= tapped <= 121  # a click takes its time, too
    page.get_by_role("button", name="× 2").click()
    expect(page.get_by_label("BPM")).to_have_value(str(2 * tapped))
    page.get_by_role("button", name="÷ 2").click()
    expect(page.get_by_label("BPM")).to_have_value(str(tapped))
    press(page, "Discard edits", "This is what the files say.")


def test_unsaved_edits_outlive_a_change_of_song_and_a_reload(page, site, review):
    visit(page, site, "morning_tide.mp3")
    page.get_by_label("Lyrics").fill("half a li")
    choose(page, CSV_SONG)
    choose(page, "morning_tide.mp3")
    expect(page.get_by_label("Lyrics")).to_have_value("half a li")
    page.get_by_label("Lyrics").press_sequentially("ne")
    expect(page.locator("#preview textarea")).to_have_value(re.compile("half a line"))
    page.reload()
    expect(page.get_by_label("Lyrics")).to_have_value("half a line")
    expect(page.locator("#message")).to_contain_text("not saved yet")
    press(page, "Discard edits", "This is what the files say.")
    assert not review.drafts


def test_a_provider_fills_the_form_and_nothing_else(page, site, songs):
    visit(page, site, LYRIC_SONG)
    press(page, "Ask this provider", "heard has answered, nothing is saved yet; bpm 50% sure; two lines")
    expect(page.get_by_label("Lyrics")).to_have_value("harbour lights aglow\nwait for me bellow")
    expect(page.get_by_label("BPM")).to_have_value("63")
    assert track_of(songs, LYRIC_SONG).bpm == 126
    press(page, "Discard edits", "This is what the files say.")
    choose(page, BARE_SONG)
    press(page, "Ask this provider", "holds no voice: try another song.")


def test_settings_reach_preview_command_and_dataset_json(page, site, songs):
    visit(page, site, "wind_up_carousel.ogg")
    page.get_by_role("button", name="The whole dataset").click()
    page.get_by_label("Trigger tag", exact=True).fill("my tag")
    expect(page.locator("#preview textarea")).to_have_value(re.compile("# Caption\nmy tag, A quick"))
    expect(page.get_by_label("To train with these")).to_have_value(re.compile("'dataset.custom_tag=my tag'"))
    press(page, "Write dataset.json", "Written: ")
    tags = {track.id: track.custom_tag for track in read_dataset_json(songs / "dataset.json").tracks}
    assert (tags["wind_up_carousel.ogg"], tags["slow_orbit.opus"]) == ("my tag", HOSTILE)  # its own goes first


def test_report_opens_from_disk(page, songs, tmp_path):
    path = write_report(scan(songs), songs / "report.html")
    page.goto(path.as_uri())
    page.wait_for_function(SEEN)
    page.locator("audio").first.evaluate("audio => { audio.muted = true; audio.play() }")
    page.wait_for_function(PLAYED)
    assert page.locator("article").count() == 9 and page.locator("img[src=x]").count() == 0
    assert HOSTILE in page.locator("body").inner_text()


def test_the_command_opens_a_folder_and_ends(page, songs):
    command = [sys.executable, "-m", "acestep_lora.studio", f"dataset.dir={songs}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as studio:
        try:
            visit(page, studio.stdout.readline().split()[1], LYRIC_SONG)
            page.get_by_label("Provider").click()
            page.get_by_role("option", name="transcriber=lrc").click()
            press(page, "Ask this provider", "transcriber=lrc has answered, nothing is saved yet")
            expect(page.get_by_label("Lyrics")).to_have_value(re.compile("Harbour lights aglow,"))
        finally:
            studio.terminate()


def test_the_command_refuses_what_it_cannot_do(songs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, reason in (
            ([], "dataset.dir is not set"),
            ([f"dataset.dir={songs / 'nowhere'}"], "is not a folder"),
            ([f"dataset.dir={songs}", f"port={port}"], f"127.0.0.1:{port} cannot be used"),
        ):
            command = [sys.executable, "-m", "acestep_lora.studio", *options]
            studio = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
            assert studio.returncode == 1
            assert [reason in line for line in studio.stderr.splitlines() if line.startswith("error: ")] == [True]
            assert "Traceback" not in studio.stderr


# ---------------------------------------------------------------- pages of a training


@pytest.fixture(scope="module")
def training(run):
    """A finished run with previews, report and samples."""
    heard = [
        "sample=true",
        "training_report=true",
        "previews.every_n_epochs=2",
        "previews.duration=3",
        "previews.share=1",
    ]
    return run("trainer.max_epochs=6", "trainer.check_val_every_n_epoch=1", "optimizer.lr=3e-3", *heard)[1]


def photograph(page, name: str) -> None:
    """A picture for the guides, where SCREENSHOTS names a folder for it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("name", ["samples/index.html", "report.html"])
def test_pages_of_a_training_play_and_ask_for_nothing(page, training, name):
    page.goto((training / name).as_uri())
    page.wait_for_function("() => [...document.images].every(i => i.complete && i.naturalWidth > 100)")
    page.locator("audio").first.evaluate("audio => { audio.muted = true; audio.play() }")
    page.wait_for_function(PLAYED)
    photograph(page, {"samples/index.html": "previews", "report.html": "training_report"}[name])


def test_evaluation_and_comparison_open_from_disk(page, training, run, configure, demo_cache, tmp_path):
    from acestep_lora import evaluate, report

    other = run("adapter=lokr", "trainer.max_steps=4")[1]
    quick = [
        "hardware=cpu",
        "dataset.crop_seconds=2",
        "duration=2",
        "clips=2",
        "repeats=1",
        f"dataset.cache_dir={demo_cache}",
    ]
    cfg = configure("evaluate", *quick, f"adapter.path=[{training},{other}]", f"output_dir={tmp_path}")
    evaluate.write(cfg, *evaluate.evaluate(cfg))
    report.compare([training, other], tmp_path / "compared.html")
    for name in ("evaluation", "compared"):
        page.goto((tmp_path / f"{name}.html").as_uri())
        page.wait_for_function("() => [...document.images].every(i => i.complete && i.naturalWidth > 100)")
        photograph(page, name)
