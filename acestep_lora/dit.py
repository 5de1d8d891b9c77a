"""The diffusion transformer, ready for training. The only file that knows the class of the model.

Adds to diffusers' AceStepTransformer1DModel what training needs and upstream lacks: masks, so that a padded batch
equals each item alone (upstream attends to padding); a time embedding that keeps float32 timesteps under a bf16 model
(t * 1000 rounds to steps of 4 in bf16); attention inside the window on the sliding layers; layers that keep less for
the backward pass; a per-layer recompute plan. Without masks it computes upstream's numbers.
"""

from functools import wraps
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel, _ace_step_rotary_freqs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acestep_lora import basemodel
from acestep_lora.attention import (
    attention,
    dense_mask,
    flash_windowed_attention,
    has_window_kernel,
    key_mask,
    window_mask,
    windowed_attention,
)
from acestep_lora.kernels import rms_norm, rotate, swiglu


class Seen(NamedTuple):
    """How a forward attends, decided once for all layers; a mask is None where there is nothing to mask.

    kernel: of the sliding layers; full, cross: masks of the full and the cross-attention; window: mask of the sliding
    layers, block by block or dense; real: patches [b, n] that are not padding.
    """

    kernel: str
    full: Tensor | None
    cross: Tensor | None
    window: Tensor | None
    real: Tensor | None


class Block(nn.Module):
    """A layer of upstream's: its parts under their names, its numbers, by cheaper means."""

    def __init__(self, layer: nn.Module, sliding: bool) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self.scale_shift_table = layer.scale_shift_table
        self.sliding = sliding

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], modulation: Tensor, condition: Tensor, seen: Seen
    ) -> Tensor:
        """hidden [b, n, h], rotary as in `kernels.rotate`, modulation [b, 6, h], condition [b, l, h] -> [b, n, h]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + modulation).chunk(6, dim=1)
        states = torch.addcmul(shift, rms_norm(self.self_attn_norm, hidden), 1 + scale).type_as(hidden)
        hidden = torch.addcmul(hidden, self._self_attention(states, rotary, seen), gate).type_as(hidden)
        states = rms_norm(self.cross_attn_norm, hidden)
        query, key, value = self._project(self.cross_attn, states, condition)
        hidden = hidden + self._out(self.cross_attn, attention(query, key, value, seen.cross)).type_as(hidden)
        states = torch.addcmul(mlp_shift, rms_norm(self.mlp_norm, hidden), 1 + mlp_scale).type_as(hidden)
        states = self.mlp.down_proj(swiglu(self.mlp.gate_proj(states), self.mlp.up_proj(states)))
        return torch.addcmul(hidden, states, mlp_gate).type_as(hidden)

    def _self_attention(self, states: Tensor, rotary: tuple[Tensor, Tensor], seen: Seen) -> Tensor:
        query, key, value = self._project(self.self_attn, states, states)
        query, key, window = rotate(query, rotary), rotate(key, rotary), self.self_attn.sliding_window
        if not self.sliding or states.shape[1] <= window + 1:  # or the window covers everything
            out = attention(query, key, value, seen.full)
        elif seen.kernel == "dense":
            out = attention(query, key, value, seen.window)
        elif seen.kernel == "flash":
            out = flash_windowed_attention(query, key, value, window)
        else:
            out = windowed_attention(query, key, value, window, seen.real, seen.window)
        return self._out(self.self_attn, out)

    @staticmethod
    def _project(attn: nn.Module, states: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, n, h, d] of `states`, keys and values [b, k, g, d] of `source`, in one dtype."""
        query = attn.to_q(states).unflatten(-1, (attn.heads, attn.head_dim))
        key, value = (to(source).unflatten(-1, (attn.kv_heads, attn.head_dim)) for to in (attn.to_k, attn.to_v))
        return rms_norm(attn.norm_q, query), rms_norm(attn.norm_k, key), value

    @staticmethod
    def _out(attn: nn.Module, out: Tensor) -> Tensor:
        return attn.to_out[0](out.flatten(2, 3))


class AceStepDiT(AceStepTransformer1DModel):
    """The decoder of ACE-Step 1.5, called as v = dit(x_t, t, condition, context, ...).

    Attributes:
        recompute: layers whose activations are dropped in the forward pass and computed again in the backward pass.
        kernel: how the sliding layers compute, one of `attention.KINDS`.
    """

    @wraps(AceStepTransformer1DModel.__init__)
    def __init__(self, *args, **config) -> None:
        super().__init__(*args, **config)
        kinds = zip(self.layer_types, self.layers, strict=True)
        self.layers = nn.ModuleList(Block(layer, kind == "sliding_attention") for kind, layer in kinds)
        self.recompute: frozenset[int] = frozenset()
        self.kernel = "auto"
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._still: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor,
        context: Tensor,
        condition_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x_t: noisy latents [b, t, c].
            t: timesteps [b] in [0, 1], 1 is pure noise; keep them float32.
            condition: states of the condition encoder [b, l, d].
            context: source latents and chunk mask [b, t, 2c].
            condition_mask: [b, l] bool, True for real tokens; None when there is no padding.
            frame_mask: [b, t] bool, True for real frames, real frames first; None when there is no padding.

        Returns:
            v [b, t, c]; frames outside `frame_mask` are meaningless.
        """
        hidden, patches = self._patchify(x_t, context, frame_mask)
        temb, modulation = self._time(t)
        condition = self.condition_embedder(condition.to(self.condition_embedder.weight.dtype))
        rotary, seen = self._rotary_table(hidden), self._seen(hidden, condition, patches, condition_mask)
        for i, layer in enumerate(self.layers):
            arguments = (hidden, rotary, modulation, condition, seen)
            if i in self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=self.training)
            else:
                hidden = layer(*arguments)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = torch.addcmul(shift, rms_norm(self.norm_out, hidden), 1 + scale).type_as(hidden)
        return self.proj_out_conv(hidden.transpose(1, 2)).transpose(1, 2)[:, : x_t.shape[1]]

    def _patchify(self, x_t: Tensor, context: Tensor, frame_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """-> patches [b, n, h] and which of them hold a real frame [b, n], or None when all do.

        Padding frames are zeroed: a patch half real, half padding then equals the zero-padded end of the item alone.
        """
        hidden = torch.cat([context.to(x_t.dtype), x_t], dim=-1)
        if frame_mask is not None:
            hidden = hidden.masked_fill(~frame_mask.unsqueeze(-1), 0)
        missing = -hidden.shape[1] % self.patch_size
        hidden = F.pad(hidden, (0, 0, 0, missing)).to(self.proj_in_conv.weight.dtype)
        hidden = self.proj_in_conv(hidden.transpose(1, 2)).transpose(1, 2).contiguous()
        if frame_mask is None:
            return hidden, None
        return hidden, F.pad(frame_mask, (0, missing)).unflatten(1, (-1, self.patch_size)).any(-1)

    def _seen(self, hidden: Tensor, condition: Tensor, real: Tensor | None, condition_mask: Tensor | None) -> Seen:
        """How this forward attends: kernel and masks."""
        kernel, length, window = self.kernel, hidden.shape[1], self.config.sliding_window
        if kernel == "auto" and has_window_kernel(hidden.device, hidden.dtype):
            kernel = "flash"
        if kernel == "auto" or kernel == "flash" and real is not None:  # torch's kernel knows no padding
            kernel = "blocks"
        if kernel == "dense":
            full, cross = dense_mask(length, length, hidden), dense_mask(length, condition.shape[1], hidden)
            return Seen(kernel, full, cross, dense_mask(length, length, hidden, window), real)
        within = (
            window_mask(length, window, hidden.device, real) if kernel == "blocks" and length > window + 1 else None
        )
        return Seen(kernel, key_mask(real), key_mask(condition_mask), within, real)

    def _rotary_table(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines [n, 1, d] and sines [n, 1, d / 2], the start of a table that is longer than any batch so far.

        Longer, not as long: a compiled layer would take the two lengths for one, and be compiled again when they part.
        """
        length, kept = hidden.shape[1], self._rotary
        if kept is None or len(kept[0]) <= length or (kept[0].dtype, kept[0].device) != (hidden.dtype, hidden.device):
            with torch.inference_mode(False):  # a validation batch may be the first; training needs the table, too
                more = (length // 1024 + 1) * 1024
                cos, sin = _ace_step_rotary_freqs(more, self.head_dim, self.rope_theta, hidden.device, hidden.dtype)
            self._rotary = cos[:, None], sin[:, None, : self.head_dim // 2]
        return self._rotary[0][:length], self._rotary[1][:length]

    def _time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of t and of t - r, which is always 0 here: temb [b, h] and the blocks' modulation [b, 6, h]."""
        temb, modulation = self._embed(self.time_embed, t.float())
        still = self._still
        if still is None or still[0].dtype != temb.dtype or still[0].device != temb.device:
            with torch.inference_mode(False):
                still = self._embed(self.time_embed_r, torch.zeros(1, device=t.device))
            self._still = None if still[0].requires_grad else still  # a constant, unless it is being trained
        return temb + still[0], modulation + still[1]

    @staticmethod
    def _embed(embed: nn.Module, t: Tensor) -> tuple[Tensor, Tensor]:
        sinusoid = embed.time_sinusoid(t * embed.scale)
        temb = embed.linear_2(embed.act1(embed.linear_1(sinusoid.to(embed.linear_1.weight.dtype))))
        return temb, embed.time_proj(embed.act2(temb)).unflatten(1, (6, -1))


def load_dit(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> AceStepDiT:
    """Load the transformer from an original-layout variant folder or a diffusers `transformer/` folder.

    Reads JSON and safetensors only. Raises BaseModelError when a key is left over or missing.
    """
    return basemodel.build(AceStepDiT, path, "decoder", dtype, device)
