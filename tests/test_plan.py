"""The plan against real steps: memory by torch's own profiler, FLOPs against the closed form, and what follows."""

import itertools
import math

import pytest
import torch
from hydra.utils import instantiate
from rich.console import Console

import train
from acestep_lora import bench, costs, plan
from acestep_lora.errors import UserError

SHALLOW = "model.shape.transformer.num_hidden_layers=2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job(configure):
    """job("adapter=lokr", ...) -> a job of the mid-size model with short songs."""

    def make(*overrides: str, model: str = "mid", seconds: int = 6):
        accumulate = [] if any("accumulate" in text for text in overrides) else ["trainer.accumulate_grad_batches=1"]
        cfg = configure(
            "train", f"model={model}", "hardware=cpu", f"dataset.crop_seconds={seconds}", *accumulate, *overrides
        )
        return plan.job_of(cfg, instantiate(cfg.hardware), None)

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("adapter=lokr", "hardware.recompute=3"),
        ("adapter=dora", "dataset.batch_size=2"),
        ("adapter=loha", "optimizer=adafactor"),
        ("adapter=oft", "hardware.recompute=all"),
        ("adapter.mlp=true", "adapter.dropout=0.1", "trainer.accumulate_grad_batches=4"),
        ("hardware.attention=dense", "optimizer=prodigy"),
        ("adapter=none",),
        ("preservation.weight=1", "hardware.recompute=2"),
    ],
    ids=" ".join,
)
def test_predicted_memory_is_what_the_profiler_measures(job, overrides):
    planned = job(*overrides)
    assert plan.predict(planned).peak == pytest.approx(bench.peak_of(planned, CPU), rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [(), ("hardware.recompute=all",), ("adapter=lokr",)], ids=" ".join)
def test_predicted_memory_is_what_cuda_measures(configure, overrides):
    cfg = configure("train", "model=mid", "dataset.crop_seconds=60", *overrides)
    planned = plan.job_of(cfg, instantiate(cfg.hardware), None)
    assert plan.predict(planned).peak == pytest.approx(bench.peak_of(planned, torch.device("cuda")), rel=0.1)


def test_a_step_at_the_real_shape_costs_what_it_must(job):
    """2B, 240 s, rank 64, one song, nothing recomputed."""
    flops, least = plan.count_flops(job(model="turbo", seconds=240))
    assert sum(least.values()) < flops < 1.03 * sum(least.values())


def test_window_pairs():
    for length, window in itertools.product(range(1, 12), range(0, 14)):
        pairs = sum(abs(i - j) <= window for i in range(length) for j in range(length))
        assert costs.window_pairs(length, window) == pairs


def test_recomputed_layers_between_the_ends(job):
    """The number of layers is found from three predictions; a fourth, of the very job, agrees."""
    recompute = plan.Recompute(job(seconds=10))
    for layers in (0, 3, 6, recompute.job.depth):
        exact = plan.predict(recompute.job.but(recompute=layers)).peak
        assert recompute.at(layers).peak == pytest.approx(exact, rel=0.01)
    assert recompute.fewest(math.inf) == 0
    assert recompute.fewest(recompute.at(5).total) == 5
    assert recompute.fewest(recompute.all.total - 1) is None


def test_a_job_that_cannot_fit_is_refused_before_weights_are_read(configure, tmp_path, demo_cache, monkeypatch):
    monkeypatch.setattr("acestep_lora.module.load_dit", lambda *_, **__: pytest.fail("weights were read"))
    cfg = configure("train", "logger=csv", f"dataset.cache_dir={demo_cache}", "hardware.vram_gb=0.2", "hardware=cpu")
    with pytest.raises(UserError, match=r"needs .* GiB \(predicted\) and there are 0.20: .*"):
        train.train(cfg, tmp_path / "run")


def test_what_would_make_it_fit_is_named(job):
    planned = job("dataset.batch_size=4", SHALLOW, seconds=60)
    one = job(SHALLOW, seconds=60)
    room = plan.predict(one.but(recompute=one.depth)).total * 1.001
    assert plan.remedy(planned, room).startswith("dataset.batch_size=1 trainer.accumulate_grad_batches=4 ")
    assert "crop_seconds=" in plan.remedy(one, room * 0.999)
    assert "smaller model" in plan.remedy(one, plan.ALLOWANCE)


def test_the_report(job, capsys):
    plan.show(job(), 8, {"VAE": 2**30}, Console(width=200))
    told = capsys.readouterr().out
    for word in (
        "activations",
        "workspace allowance",
        "80 GiB",
        "H100",
        "x the least possible",
        "All predicted",
        "1.60",
    ):
        assert word in told


@pytest.mark.parametrize("model", ["turbo", "nano"])
def test_preprocessing_is_planned(configure, nano, model):
    cfg = configure("train", f"model={model}", "hardware=cpu")
    base = nano if model == "nano" else None
    hardware = instantiate(cfg.hardware)
    assert plan.predict_vae(cfg, base) > 0 and plan.predict_text(cfg, hardware, base) > 0
    if base is None:
        assert 600e6 * 4 < plan.predict_text(cfg, hardware, None) < 2e9 * 4  # at least the text encoder, in float32


def test_a_checkpoint_wins_over_the_published_sizes(configure, nano, caplog):
    cfg = configure("train", "model=turbo")
    with caplog.at_level("INFO"):
        shape = plan.transformer_shape(cfg, nano)
    assert shape["hidden_size"] != 2048 and "hidden_size is" in caplog.text
