"""Floating-point operations of a training step: counted, and the least there can be."""

import math
from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from acestep_lora.attention import varlen_attn

_ATEN = torch.ops.aten


def _forward(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad, query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _window_forward(query, key, value, ends, *_, out_shape=None, **__) -> int:
    return 4 * _pairs_by_channels(query, ends, _)


def _window_backward(grad, query, key, value, out, lse, ends, *_, out_shape=None, **__) -> int:
    return 10 * _pairs_by_channels(query, ends, _)


def _pairs_by_channels(query, ends, rest) -> int:
    """torch counts every pair for its kernel with windows; `rest` holds the window's two sides."""
    window, items = next(value for value in rest if isinstance(value, list))[0], ends[0] - 1
    return items * window_pairs(query[0] // items, window) * query[1] * query[2]


# Of the CPU's attention kernel torch's counter knows nothing by itself.
_COUNTED = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _forward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
if varlen_attn is not None:
    _COUNTED |= {
        torch.ops.torch_attn._varlen_attn: _window_forward,
        torch.ops.torch_attn._varlen_attn_backward: _window_backward,
    }


def count(run: Callable[[], object]) -> int:
    """FLOPs that `run` spends, as torch counts them."""
    with FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        run()
    return counter.get_total_flops()


def window_pairs(length: int, window: int) -> int:
    """How many (i, j) of a sequence have |i - j| <= window."""
    reach = min(window, length - 1)
    return length * (2 * reach + 1) - reach * (reach + 1)


def minimum(shape: Mapping, batch: int, frames: int, tokens: int, adapter: Mapping[str, int]) -> dict[str, int]:
    """The least FLOPs of a step that trains an adapter on a frozen transformer, by part.

    A frozen product costs 2 FLOPs per weight and position forward and 2 for the gradient of its input, where that is
    wanted; a trained one 2 more for its own gradient (the condition's input has none). Attention costs 4 per pair and
    channel forward and 10 backward, with its scores computed again, as every kernel that does not store them must.

    Args:
        shape: config of the transformer; frames: latents of an item; tokens: condition states of an item.
        adapter: module in diffusers' terms -> trained parameters there.
    """
    hidden, heads, groups = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    patches, channels, wide = math.ceil(frames / shape["patch_size"]), shape["in_channels"], heads * shape["head_dim"]
    n, m, narrow, layers = batch * patches, batch * tokens, groups * shape["head_dim"], shape["num_hidden_layers"]
    kinds = shape.get("layer_types") or ["sliding_attention", "full_attention"] * layers
    sliding = sum(kind == "sliding_attention" for kind in kinds[:layers])
    block = hidden * (wide + 2 * narrow) + wide * hidden + 2 * hidden * wide + 3 * hidden * shape["intermediate_size"]
    pairs = window_pairs(patches, shape["sliding_window"])
    outside = channels + shape["audio_acoustic_hidden_dim"]
    embedding = shape.get("encoder_hidden_size") or hidden
    lone = hidden * (wide + 2 * narrow)  # the first layer's queries, keys and values: their input is not trained
    return {
        "frozen products, forward": 2 * n * (layers * block + hidden * shape["patch_size"] * outside)
        + 2 * m * hidden * (layers * 2 * narrow + embedding)
        + 2 * batch * 2 * (256 * hidden + hidden * hidden + 6 * hidden * hidden),
        "frozen products, gradient": 2 * n * (layers * block - lone + hidden * shape["patch_size"] * channels // 3),
        "adapter": sum(4 * size * m if _of_condition(name) else 6 * size * n for name, size in adapter.items()),
        "windowed attention": 14 * batch * sliding * pairs * wide,
        "full attention": 14 * batch * (layers - sliding) * patches * patches * wide,
        "cross-attention": 14 * batch * layers * patches * tokens * wide,
    }


def _of_condition(module: str) -> bool:
    """Whether a module works on the condition's states and not on the patches."""
    return "cross_attn.to_k" in module or "cross_attn.to_v" in module
