"""A frozen base in 4 or 8 bits: what trains on it, what that adapter is worth on the real base, what it saves."""

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from acestep_lora import adapters, plan
from acestep_lora.errors import UserError
from acestep_lora.job import Step
from acestep_lora.quantize import KINDS, weight_of

PAIRS = [(kind, adapter) for kind in KINDS[1:] for adapter in ("lora", "rslora", "dora", "oft", "lokr")]
PAIRS.remove(("int8", "dora"))


@pytest.fixture(scope="module")
def job(configure):
    def make(*overrides: str):
        size = ["dataset.crop_seconds=4", "model.shape.transformer.num_hidden_layers=2"]
        cfg = configure("train", "model=mid", "hardware=cpu", "trainer.accumulate_grad_batches=1", *size, *overrides)
        return plan.job_of(cfg, instantiate(cfg.hardware), None)

    return make


def train(job, steps: int = 6) -> Step:
    torch.manual_seed(0)
    step = Step(job, job.module("cpu"))
    for _ in range(steps):
        step.run()
    return step


@pytest.mark.parametrize("kind, adapter", PAIRS)
def test_adapters_learn_on_packed_weights(job, kind, adapter):
    """The loss falls, and the adapter trained on packed weights does the same to the base that is not packed."""
    step = train(job(f"model.quantize={kind}", f"adapter={adapter}", "optimizer.lr=0.001"), steps=0)
    before = float(step.forward())
    for _ in range(6):
        step.run()
    after = float(step.forward())
    assert after < before - 0.005
    state = adapters.state(step.module.dit)
    torch.manual_seed(0)
    plain = Step(job(f"adapter={adapter}"), job(f"adapter={adapter}").module("cpu"))
    plain.batch = step.batch
    assert float(plain.forward()) == pytest.approx(before, abs=0.05)
    with torch.no_grad():
        for name, weight in adapters.state(plain.module.dit).items():
            weight.copy_(state[name])  # the state holds the parameters themselves
    assert float(plain.forward()) == pytest.approx(after, abs=0.05)


@pytest.mark.parametrize("kind, share", [("nf4", 0.16), ("int8", 0.27)])
def test_packed_weights_are_smaller_and_so_planned(job, kind, share):
    plain, packed = job(), job(f"model.quantize={kind}")
    module, real = packed.module("cpu"), plain.module("cpu")

    def products(module) -> int:
        layers = module.dit.layers.named_modules()
        linears = [layer for name, layer in layers if isinstance(layer, nn.Linear) and ".lora_" not in name]
        return sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)

    assert products(module) < share * products(real)
    saved = plan.predict(plain).base - plan.predict(packed).base
    assert saved == pytest.approx(products(real) - products(module), rel=0.1)


def test_unpacked_weights_are_close(job):
    torch.manual_seed(0)
    packed = job("model.quantize=nf4").module("cpu").dit.layers[0].mlp.up_proj
    torch.manual_seed(0)
    plain = job().module("cpu").dit.layers[0].mlp.up_proj
    error = (weight_of(packed) - plain.weight).norm() / plain.weight.norm()
    assert 0 < error < 0.12


@pytest.mark.parametrize(
    "overrides", [("adapter=loha",), ("adapter=none",), ("adapter=dora", "model.quantize=int8")], ids=" ".join
)
def test_what_cannot_train_on_packed_weights_is_refused(job, overrides):
    with pytest.raises(UserError, match="does not train on"):
        job("model.quantize=nf4", *overrides).module("cpu")


def test_misspelt_kind(job):
    with pytest.raises(UserError, match="model.quantize=nf8 is none of none, nf4, int8"):
        job("model.quantize=nf8").module("cpu")
