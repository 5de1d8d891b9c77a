"""Compiled layers: the same numbers, no graph break, and no compilation again as the lengths of batches vary."""

import pytest
import torch
import torch._dynamo
from hydra.utils import instantiate

from acestep_lora import plan
from acestep_lora.job import Step


@pytest.fixture
def job(configure):
    def make(*overrides: str):
        size = ["model.shape.transformer.num_hidden_layers=2", "dataset.crop_seconds=24"]
        cfg = configure("train", "model=mid", "hardware=cpu", "trainer.accumulate_grad_batches=1", *size, *overrides)
        planned = plan.job_of(cfg, instantiate(cfg.hardware), None)
        torch.manual_seed(0)
        return planned, Step(planned, planned.module("cpu"))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield make
    torch._dynamo.reset()


@pytest.mark.parametrize("adapter", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_no_graph_break_and_no_recompilation(job, adapter, monkeypatch):
    """Traced for any length at once; the code generator itself is not called, which would take a minute."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile(self, backend="aot_eager", fullgraph=True, **options),
    )
    planned, step = job(f"adapter={adapter}", "hardware.compile=true")
    _, plain = job(f"adapter={adapter}")
    counts = []
    for frames, tokens in ((300, 50), (360, 61), (844, 40), (400, 33)):
        step.batch = plain.batch = planned.but(frames=frames, tokens=tokens).batch()
        loss = step.gradients()
        torch.testing.assert_close(loss, plain.gradients(), rtol=1e-5, atol=1e-5)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 0 < counts[0] <= 3 and len(set(counts)) == 1


@pytest.mark.slow
def test_generated_code_computes_the_same(job):
    _, compiled = job("hardware.compile=true")
    _, plain = job()
    compiled.batch = plain.batch
    torch.testing.assert_close(compiled.gradients(), plain.gradients(), rtol=1e-4, atol=1e-4)
