"""The diffusion transformer, ready for training. The only file that knows the class of the model.

Adds to diffusers' AceStepTransformer1DModel what training needs and upstream lacks: masks, so that a padded batch
equals each item alone (upstream attends to padding); a time embedding that keeps float32 timesteps under a bf16 model
(t * 1000 rounds to steps of 4 in bf16); attention inside the window on the sliding layers; a per-layer recompute plan.
Without masks it computes upstream's numbers.
"""

from functools import wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel, _ace_step_rotary_freqs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from acestep_lora import basemodel
from acestep_lora.attention import WindowedProcessor, key_mask


class AceStepDiT(AceStepTransformer1DModel):
    """The decoder of ACE-Step 1.5, called as v = dit(x_t, t, condition, context, ...)."""

    recompute: frozenset[int] = frozenset()
    """Layers whose activations are dropped in the forward pass and computed again in the backward pass."""

    @wraps(AceStepTransformer1DModel.__init__)
    def __init__(self, *args, **config) -> None:
        super().__init__(*args, **config)
        for kind, layer in zip(self.layer_types, self.layers, strict=True):
            if kind == "sliding_attention":
                layer.self_attn.set_processor(WindowedProcessor())

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
        rotary = _ace_step_rotary_freqs(hidden.shape[1], self.head_dim, self.rope_theta, hidden.device, hidden.dtype)
        masks = {"full_attention": key_mask(patches), "sliding_attention": patches}
        cross_mask = key_mask(condition_mask)
        for i, layer in enumerate(self.layers):
            arguments = (hidden, rotary, modulation, masks[self.layer_types[i]], condition, cross_mask)
            if i in self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = (self.norm_out(hidden) * (1 + scale) + shift).type_as(hidden)
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
        hidden = self.proj_in_conv(hidden.transpose(1, 2)).transpose(1, 2)
        if frame_mask is None:
            return hidden, None
        return hidden, F.pad(frame_mask, (0, missing)).unflatten(1, (-1, self.patch_size)).any(-1)

    def _time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of t and of t - r, which is always 0 here: temb [b, h] and the blocks' modulation [b, 6, h]."""
        total = None
        for embed, value in ((self.time_embed, t.float()), (self.time_embed_r, torch.zeros_like(t, dtype=torch.float))):
            sinusoid = embed.time_sinusoid(value * embed.scale)
            temb = embed.linear_2(embed.act1(embed.linear_1(sinusoid.to(embed.linear_1.weight.dtype))))
            modulation = embed.time_proj(embed.act2(temb)).unflatten(1, (6, -1))
            total = (temb, modulation) if total is None else (total[0] + temb, total[1] + modulation)
        return total


def load_dit(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> AceStepDiT:
    """Load the transformer from an original-layout variant folder or a diffusers `transformer/` folder.

    Reads JSON and safetensors only. Raises BaseModelError when a key is left over or missing.
    """
    return basemodel.build(AceStepDiT, path, "decoder", dtype, device)
