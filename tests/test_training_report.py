"""The verdict on curves whose outcome is known, the report of a real run, and runs laid over each other."""

import json
import re
from urllib.parse import unquote

import pytest
from test_report import Page

from acestep_lora import report
from acestep_lora.data.items import VAL_TIMESTEPS
from acestep_lora.errors import UserError
from acestep_lora.verdict import Curves, judge

STEPS = range(10, 210, 10)


def curves(val, seen=None, held_out: int = 5, **more) -> Curves:
    """Of a training whose loss says nothing: noise levels vary."""
    trained = {} if seen is None else {"seen": [(step, seen(step)) for step in STEPS], "seen_base": 2.0}
    train = [(step, 1.0) for step in STEPS]
    return Curves(train, [(step, val(step)) for step in STEPS], 1.0, held_out=held_out, **trained, **more)


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    "kind, val",
    {
        "nothing": lambda step: 1 - 0.002 * (step > 100),
        "learning": lambda step: 1 - 0.002 * step,
        "converged": lambda step: 0.7 + 0.3 * 0.9 ** (step / 3),
        "memorising": lambda step: 0.8 + abs(step - 80) / 1000,
    }.items(),
)
def test_the_outcome_is_recognised_with_something_to_try(kind, val):
    verdict = judge(curves(val))
    assert verdict.kind == kind and verdict.seen and verdict.next


def test_memorising_names_the_best_step_and_the_gap():
    told = judge(curves(lambda step: 0.8 + abs(step - 80) / 1000, seen=lambda step: 2 - step / 200))
    assert told.kind == "memorising"
    assert "best at step 80, 20.0% under the base model" in told.seen[0] and "by 12.0%" in told.seen[0]
    assert told.seen[1] == "Use adapter_best/."
    assert "50% under the base model on songs it trains on and 8% on songs held out" in told.seen[2]
    assert "a gap of 42 points" in told.seen[2]


def test_what_gets_worse_everywhere_is_not_learnt_by_heart():
    told = judge(curves(lambda step: 0.8 + abs(step - 80) / 1000, seen=lambda step: 1.6 + abs(step - 80) / 500))
    assert judge(curves(lambda step: 0.8 + abs(step - 80) / 1000, held_out=0)).kind == "unstable"
    assert told.kind == "unstable" and "too large" in told.seen[0] and "optimizer.lr" in told.next[0]


def test_a_broken_loss_is_told_first():
    verdict = judge(curves(lambda step: float("nan") if step > 120 else 0.5))
    assert verdict.kind == "diverged" and "step 130" in verdict.seen[0] and "optimizer.lr" in verdict.next[0]


def test_without_validation_nothing_is_claimed():
    assert judge(Curves([(1, 1.0)], [], None)).kind == "unmeasured"


@pytest.mark.parametrize(
    "gains, words", [((0.4, 0.1), "learnt more of the sound"), ((0.1, 0.4), "learnt more of the form")]
)
def test_where_it_learnt(gains, words):
    last = {t: 1 - (gains[0] if t < 0.5 else gains[1]) for t in VAL_TIMESTEPS}
    told = judge(curves(lambda step: 0.75, last=last, base_last=dict.fromkeys(VAL_TIMESTEPS, 1.0))).seen
    assert any(words in text and "40%" in text and "10%" in text for text in told)


@pytest.mark.parametrize(
    "songs, doubt", [(None, ""), (0, "No song was held out"), (1, "on one song"), (2, "on two songs"), (3, "")]
)
def test_few_held_out_songs_are_a_hint(songs, doubt):
    told = judge(curves(lambda step: 0.7, held_out=songs)).seen[-1]
    assert told.startswith(doubt) or doubt in told
    assert bool(doubt) == ("hint" in told or "held out" in told and "five" in told)


# ---------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def folder(run):
    quick = [
        "training_report=true",
        "sample=true",
        "previews.every_n_epochs=2",
        "previews.duration=1",
        "previews.share=1",
    ]
    return run(
        "trainer.max_epochs=4", "trainer.check_val_every_n_epoch=1", "optimizer.lr=1e-2", "scheduler=constant", *quick
    )[1]


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_report_says_how_it_went(page, folder):
    record = report.read(folder)
    step, best = record.curves.best
    assert f"{best:.4f} at step {step}" in page.text and f"{best / record.curves.base - 1:+.1%}" in page.text
    assert re.search(r"step\s*8 of 8", page.text) and "took" in page.text
    for text in (
        "What it says",
        "What to try next",
        "Curves",
        "Memory",
        "activations",
        "measured, cpu",
        "Songs",
        "Settings",
    ):
        assert text in page.text
    assert len(record.curves.seen) == len(record.curves.val) and "Measured alike" in page.text
    assert re.search(r"adapter\.r\s*64", page.text) and re.search(r"songs\s*8", page.text)
    assert all(sentence in page.text for sentence in judge(record.curves).seen)


def test_it_needs_nothing_but_the_songs_beside_it(page, folder):
    players = page.attributes("audio", "src")
    assert len(players) == 4 + 3 and all((folder / unquote(player)).is_file() for player in players)
    assert all(link.startswith("data:image/png;base64,") for link in page.attributes("img", "src"))
    assert not {"script", "link", "iframe", "a"} & {tag for tag, _ in page.tags}
    assert "refresh" not in page.attributes("meta", "http-equiv")  # it is done


def test_while_it_runs_it_refreshes_and_says_what_is_left(folder, tmp_path):
    for name in ("config.yaml", "metrics.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    told = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    told |= {"done": False, "step": 6, "eta_seconds": 754}
    (tmp_path / "progress.json").write_text(json.dumps(told), encoding="utf-8")
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "refresh" in page.attributes("meta", "http-equiv")
    assert re.search(r"step\s*6 of 8\s*left\s*12:34", page.text)


def test_what_was_measured_and_predicted_is_there(folder):
    told = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    assert told["done"] is True and told["memory"]["measured"] > 2**26 and told["held_out"] == 1
    assert told["memory"]["predicted"].keys() == {"base", "adapter", "gradients", "optimizer", "activations"}


def test_runs_are_laid_over_each_other(folder, run, configure, capsys, tmp_path):
    other = run("adapter=lokr", "trainer.max_steps=2", "optimizer.lr=3e-4")[1]
    output = tmp_path / "both.html"
    assert report.main(configure("report", f"runs=[{folder},{other}]", f"output={output}")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    text = Page(output.read_text(encoding="utf-8")).text
    assert re.search(r"adapter\.name\s*lora\s*lokr", text) and re.search(r"optimizer\.lr\s*0\.01\s*0\.0003", text)
    assert "dataset.crop_seconds" not in text and "output_dir" not in text
    best = [report.read(place).curves.best[1] for place in (folder, other)]
    assert text.index(f"{min(best):.4f}") < text.index(f"{max(best):.4f}")


def test_other_prompts_have_a_curve_where_they_are_measured(tmp_path):
    row = {"step": 1.0, "train/loss": 1.0, "val/loss": 1.0}
    for measured in ({}, {"val/prior_loss": 0.1}):
        titles = [panel.title for panel in report.panels(report.Record(tmp_path, {}, [row | measured], {}))]
        assert ("distance from the base model under other prompts" in titles) == bool(measured)
        assert "gradient norm" not in titles  # nor is there a picture of nothing


def test_one_run_is_reported_again(folder, configure, capsys):
    assert report.main(configure("report", f"runs={folder}")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.html")


def test_what_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a training"):
        report.read(tmp_path)
