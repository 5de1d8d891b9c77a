"""Attention inside a window, at a cost that grows with the length and not with its square.

The sliding layers of the DiT let patch i see patch j when |i - j| <= window. Upstream computes all pairs and masks most
of them away. Here queries are cut into blocks, each of which meets only the keys that its window can reach: plain
tensor operations, exact on every device, forward and backward.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.ace_step_transformer import AceStepAttnProcessor2_0, _is_flash_attention_backend
from torch import Tensor

MIN_BLOCK = 64
"""Queries per block at least: with a narrower window, blocks of its size would be too many small products."""


def key_mask(real: Tensor | None) -> Tensor | None:
    """Real positions [b, n] bool -> mask [b, 1, 1, n] of the keys every query may see; None stays None.

    None, not a mask of ones, wherever there is no padding: the attention kernel is then free to take its fastest path.
    """
    return None if real is None else real[:, None, None, :]


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int, real: Tensor | None = None) -> Tensor:
    """Softmax attention over |i - j| <= window.

    Args:
        query: [b, n, h, d]; key, value: [b, n, g, d], h a multiple of g (grouped queries).
        real: [b, n] bool, False for padding, which no query sees; None when there is none.

    Returns:
        [b, n, h, d]; rows of padding are meaningless but finite.
    """
    batch, length, heads, _ = query.shape
    block = max(window, MIN_BLOCK)
    span, missing = block + 2 * window, -length % block
    real = torch.ones(1, length, dtype=torch.bool, device=query.device) if real is None else real
    blocks = F.pad(query, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block)).flatten(0, 1)  # [b * m, block, h, d]

    def reach(states: Tensor) -> Tensor:
        """[b, n, g, d] -> [b * m, span, g, d]: for each block, what its queries may see."""
        padded = F.pad(states, (0, 0, 0, 0, window, window + missing))
        return padded.unfold(1, span, block).permute(0, 1, 4, 2, 3).flatten(0, 1)

    distance = torch.arange(span, device=query.device) - window - torch.arange(block, device=query.device)[:, None]
    seen = F.pad(real, (window, window + missing)).unfold(1, span, block)  # [b or 1, m, span]
    # A query of padding far from every real key would see nothing, and softmax over nothing is NaN: it sees itself.
    mask = (distance.abs() <= window) & seen.unsqueeze(2) | (distance == 0)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)  # [b * m, 1, block, span]
    states = (blocks.transpose(1, 2), reach(key).transpose(1, 2), reach(value).transpose(1, 2))
    out = F.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=heads != key.shape[2])
    return out.transpose(1, 2).reshape(batch, -1, *query.shape[2:])[:, :length]


class WindowedProcessor(AceStepAttnProcessor2_0):
    """diffusers' attention processor for the sliding layers; `attention_mask` is the real patches [b, n], or None."""

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ) -> Tensor:
        length = hidden_states.shape[1]
        if length <= attn.sliding_window + 1 or (attention_mask is None and _is_flash_attention_backend(self)):
            mask = key_mask(attention_mask)  # the window covers everything, or the kernel has windows of its own
            return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, attn.head_dim)))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim)))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim))
        rotate = {"use_real": True, "use_real_unbind_dim": -2, "sequence_dim": 1}
        query, key = (apply_rotary_emb(states, image_rotary_emb, **rotate) for states in (query, key))
        out = windowed_attention(query, key, value, attn.sliding_window, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).to(query.dtype)))
