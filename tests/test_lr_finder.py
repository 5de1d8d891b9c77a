"""The range test on nano: its suggestion learns, a hundredth of it hardly does, and it is found again."""

import json

import numpy as np
import pytest

from acestep_lora import lr_finder
from acestep_lora.errors import UserError


@pytest.fixture(scope="module")
def found(configure, demo_cache, tmp_path_factory):
    def go() -> dict:
        folder = tmp_path_factory.mktemp("lr")
        quick = ["logger=csv", "hardware=cpu", "dataset.crop_seconds=2", f"dataset.cache_dir={demo_cache}"]
        assert lr_finder.main(configure("train", *quick, "adapter.r=8", f"output_dir={folder}")) == 0
        assert (folder / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
        return json.loads((folder / "lr_finder.json").read_text())

    return go


def test_the_suggestion_learns_and_is_found_again(found, run):
    told = found()
    assert told == found()
    assert min(told["losses"]) < 0.9 * told["losses"][0] and told["rates"] == list(
        lr_finder.RATES[: len(told["losses"])]
    )
    rate = told["suggested"]
    assert 1e-5 < rate < 1e-1
    steps = ("trainer.max_epochs=5", "trainer.accumulate_grad_batches=7", "adapter.r=8", "scheduler=constant")
    metrics = [run(*steps, f"optimizer.lr={lr}")[0].metric for lr in (rate, rate / 100)]
    assert metrics[0] < metrics[1]


def test_the_steepest_fall_is_suggested():
    x = np.log10(lr_finder.RATES)
    losses = 2 - 1 / (1 + np.exp(-6 * (x + 3))) + np.where(x > -2, (x + 2) ** 2, 0)
    assert lr_finder.suggest(losses) == pytest.approx(1e-3, rel=0.3)
    with pytest.raises(UserError, match="did not fall"):
        lr_finder.suggest(np.linspace(1, 2, 30))


def test_prodigy_needs_no_rate(configure):
    with pytest.raises(UserError, match="optimizer=prodigy"):
        lr_finder.main(configure("train", "optimizer=prodigy"))
