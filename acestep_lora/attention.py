"""Attention inside a window, at a cost that grows with the length and not with its square.

The sliding layers of the DiT let patch i see patch j when |i - j| <= window. Upstream computes all pairs and masks most
of them away. Here queries are cut into blocks, each of which meets only the keys that its window can reach: plain
tensor operations, exact on every device, forward and backward. Where torch has a kernel with windows of its own
(FlashAttention, half precision on CUDA from compute capability 8.0), that one is used.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

MIN_BLOCK = 64
"""Queries per block at least: with a narrower window, blocks of its size would be too many small products."""
KINDS = ("auto", "flash", "blocks", "dense")
"""How the sliding layers compute; `dense`, all pairs under masks, is the official trainer's way, to compare with."""


def has_window_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own kernel can do windows here."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or varlen_attn is None:
        return False
    return (
        torch.cuda.get_device_capability(device) >= (8, 0)
        and "window_size" in inspect.signature(varlen_attn).parameters
    )


def key_mask(real: Tensor | None) -> Tensor | None:
    """Real positions [b, n] bool -> mask [b, 1, 1, n] of the keys every query may see; None stays None.

    None, not a mask of ones, wherever there is no padding: the attention kernel is then free to take its fastest path.
    """
    return None if real is None else real[:, None, None, :]


def dense_mask(queries: int, keys: int, like: Tensor, window: int | None = None) -> Tensor:
    """The additive mask [1, 1, q, k] that the official trainer builds, in the dtype of `like`."""
    mask = torch.zeros(queries, keys, dtype=like.dtype, device=like.device)
    if window is not None:
        position = torch.arange(keys, device=like.device)
        mask.masked_fill_((position[:, None] - position).abs() > window, torch.finfo(like.dtype).min)
    return mask[None, None]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: query [b, n, h, d], key and value [b, k, g, d], h a multiple of g -> [b, n, h, d]."""
    groups = query.shape[2] // key.shape[2]
    if mask is not None and query.is_cuda and groups > 1:  # CUDA's kernel for masks takes no grouped queries
        key, value = (states.repeat_interleave(groups, dim=2) for states in (key, value))
    states = (each.transpose(1, 2) for each in (query, key, value))
    out = F.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=query.shape[2] != key.shape[2])
    return out.transpose(1, 2)


def _block(window: int) -> int:
    return max(window, MIN_BLOCK)


def _reach(states: Tensor, window: int) -> Tensor:
    """[b, n, ...] -> [b, m, span, ...]: for each block, what its queries may see; zeros beyond the ends."""
    block = _block(window)
    missing = -states.shape[1] % block
    padded = F.pad(states, (0, 0) * (states.ndim - 2) + (window, window + missing))
    return padded.unfold(1, block + 2 * window, block).movedim(-1, 2)


def window_mask(length: int, window: int, device: torch.device, real: Tensor | None = None) -> Tensor:
    """What each query of each block sees [b * m, 1, block, span]; the same for every layer, so made once per forward.

    real: [b, n] bool, False for padding, which no query sees; None when there is none.
    """
    real = torch.ones(1, length, dtype=torch.bool, device=device) if real is None else real
    block = _block(window)
    distance = torch.arange(block + 2 * window, device=device) - window - torch.arange(block, device=device)[:, None]
    # A query of padding far from every real key would see nothing, and softmax over nothing is NaN: it sees itself.
    return ((distance.abs() <= window) & _reach(real, window).unsqueeze(2) | (distance == 0)).flatten(0, 1).unsqueeze(1)


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, real: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention over |i - j| <= window.

    Args:
        query: [b, n, h, d]; key, value: [b, n, g, d], h a multiple of g (grouped queries).
        real: [b, n] bool, False for padding, which no query sees; None when there is none.
        mask: what `window_mask` makes of `real`, where it is at hand already.

    Returns:
        [b, n, h, d]; rows of padding are meaningless but finite.
    """
    batch, length = query.shape[:2]
    mask = window_mask(length, window, query.device, real) if mask is None else mask
    block = _block(window)
    blocks = F.pad(query, (0, 0, 0, 0, 0, -length % block)).unflatten(1, (-1, block)).flatten(0, 1)
    if len(mask) < len(blocks):  # made for one item without padding: the same for all
        mask = mask.repeat(batch, 1, 1, 1)
    out = attention(blocks, _reach(key, window).flatten(0, 1), _reach(value, window).flatten(0, 1), mask)
    return out.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]


def flash_windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """The same by torch's kernel, for batches without padding."""
    batch, length = query.shape[:2]
    ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    states = (each.to(value.dtype).flatten(0, 1) for each in (query, key, value))
    out = varlen_attn(*states, ends, ends, length, length, window_size=(window, window), enable_gqa=True)
    return out.unflatten(0, (batch, length))
