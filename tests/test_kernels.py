"""The layers' own kernels and cheaper adapter layers against what they stand in for, forward and backward."""

import functools

import peft
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.ace_step_transformer import AceStepMLP, _ace_step_rotary_freqs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acestep_lora.kernels import rms_norm, rotate, swiglu
from acestep_lora.layers import CHEAPER, exchange


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def same(ours, theirs, tolerance: float = 1e-5) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("trained", [False, True])
def test_rms_norm(trained):
    torch.manual_seed(0)
    norm, x = RMSNorm(24, eps=1e-6).requires_grad_(trained), torch.randn(2, 7, 24, requires_grad=True)
    norm.weight.data.uniform_(0.5, 2)
    inputs = (x, norm.weight) if trained else (x,)
    same(gradients(rms_norm(norm, x), *inputs), gradients(norm(x), *inputs))


def test_swiglu_and_what_it_keeps():
    torch.manual_seed(0)
    mlp, x = AceStepMLP(8, 32), torch.randn(2, 5, 8, requires_grad=True)
    same(gradients(mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x))), x), gradients(mlp(x), x))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda none: none):
        swiglu(torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True))
    assert kept == [4, 4]  # torch's chain keeps silu(gate), too


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.sampled_from([2, 8, 64]))
def test_rotation(length, width):
    x = torch.randn(2, length, 3, width, requires_grad=True)
    cos, sin = _ace_step_rotary_freqs(length, width, 1e6, x.device, x.dtype)
    theirs = apply_rotary_emb(x, (cos, sin), use_real=True, use_real_unbind_dim=-2, sequence_dim=1)
    same(gradients(rotate(x, (cos[:, None], sin[:, None, : width // 2])), x), gradients(theirs, x))


LORA = functools.partial(peft.LoraConfig, r=4, lora_alpha=8)
KINDS = {
    "lora": LORA,
    "rslora": functools.partial(LORA, use_rslora=True),
    "dora": functools.partial(LORA, use_dora=True),
    "lokr": functools.partial(peft.LoKrConfig, r=2, alpha=4, decompose_factor=4),
    "lokr, both": functools.partial(peft.LoKrConfig, r=1, alpha=4, decompose_factor=4, decompose_both=True),
    "lokr, full": functools.partial(peft.LoKrConfig, r=64, alpha=64, decompose_factor=4),
    "loha": functools.partial(peft.LoHaConfig, r=2, alpha=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_layers_equal_peft(kind):
    """Same parameters, same state dict, same numbers; switched off, the base model's."""
    results, states = [], []
    for cheap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 32))
        peft.inject_adapter_in_model(KINDS[kind](target_modules=["0"]), model, "default")
        if cheap:
            exchange(model, CHEAPER)
            assert type(model[0]) in CHEAPER.values()
        trained = [weight.data.normal_() for weight in model.parameters() if weight.requires_grad]
        assert trained
        x = torch.randn(2, 5, 48, requires_grad=True)
        results.append(gradients(model(x), x, *(weight for weight in model.parameters() if weight.requires_grad)))
        states.append(model.state_dict())
        model[0].enable_adapters(False)
        torch.testing.assert_close(model(x), model[0].base_layer(x), rtol=0, atol=0)
    same(*results, tolerance=1e-5)
    assert states[0].keys() == states[1].keys()
