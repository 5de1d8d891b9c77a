"""The bench runs two small jobs in turn and tells what the plan says of them."""

import json

import pytest

from acestep_lora import bench


def test_two_jobs_in_turn(configure, tmp_path, capsys):
    size = ["model=mid", "hardware=cpu", "dataset.crop_seconds=12", "model.shape.transformer.num_hidden_layers=2"]
    configs = [configure("train", *size), configure("train", *size, "experiment=official")]
    ours, official = bench.bench(configs, tmp_path / "bench.json")
    assert official.flops > 1.3 * ours.flops > 1.3 * sum(ours.minimum.values())
    for timing in (ours, official):
        assert timing.step > 0 and timing.matmul_rate > 1e8 and timing.of_matmul_rate > 0.5
        assert timing.peak_predicted == pytest.approx(timing.peak_measured, rel=0.05)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["first"]["flops"] == ours.flops and written["second"]["seconds_to_first_step"] > 0
    assert 0 <= written["first"]["loader_share"] < 0.5
    assert "second / first: time" in capsys.readouterr().out
