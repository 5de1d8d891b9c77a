"""Windowed attention against all pairs with a mask: the same numbers, forward and backward, for less."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_lora.attention import windowed_attention


def dense(query, key, value, window, real):
    """All pairs; what is outside the window or padding is masked away."""
    position = torch.arange(query.shape[1])
    mask = (position[:, None] - position).abs() <= window
    mask = mask & real[:, None, None, :] | torch.eye(len(position), dtype=torch.bool)
    states = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    window=st.integers(1, 130),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2)]),
    seed=st.integers(0, 2**20),
)
def test_equals_dense_attention(lengths, window, heads, seed):
    torch.manual_seed(seed)
    batch, longest, (many, few) = len(lengths), max(lengths), heads
    states = [torch.randn(batch, longest, h, 8, requires_grad=True) for h in (many, few, few)]
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    weight = torch.randn(batch, longest, many, 8) * real[..., None, None]
    results = []
    for out in (
        windowed_attention(*states, window, None if real.all() else real),
        dense(*states, window, real),
    ):
        results.append([out * real[..., None, None], *torch.autograd.grad((out * weight).sum(), states)])
        assert out.isfinite().all()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_cost_grows_with_the_length():
    """Floating-point operations of the two matrix products, counted from the shapes SDPA is given."""
    costs = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                query, key = args[:2]
                costs.append(4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3])
            return function(*args, **(kwargs or {}))

    for seconds in (60, 120, 240, 600):
        length = seconds * 25 // 2
        states = [torch.randn(1, length, heads, 8) for heads in (2, 1, 1)]
        with Count():
            windowed_attention(*states, 128)
    assert costs[3] < 10.5 * costs[0] and costs[2] < 4.2 * costs[0]
