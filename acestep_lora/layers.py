"""PEFT's adapter layers with cheaper forwards; parameters, names, state dicts and numbers stay PEFT's.

Plain LoRA scales the narrow states instead of the wide ones and adds in one product. LoKr applies its Kronecker factors
instead of building their product, which as large as the frozen weight costs as much as a second layer.
"""

import torch
import torch.nn.functional as F
from peft.tuners import loha, lokr, lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from acestep_lora.naming import NAME


class LoraLinear(lora.Linear):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        plain = not (args or kwargs or self.merged or self.disable_adapters or self.lora_variant)
        if not plain or self.active_adapters != [NAME] or self.lora_bias[NAME]:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        x = self._cast_input_dtype(x, self.lora_A[NAME].weight.dtype)
        narrow = self.lora_A[NAME](self.lora_dropout[NAME](x)) * self.scaling[NAME]
        wide = torch.addmm(result.flatten(0, -2), narrow.flatten(0, -2), self.lora_B[NAME].weight.t())
        return wide.view_as(result)


class _Undropped:
    """A LyCORIS layer's forward without a random number drawn on the host where there is no dropout to decide."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        plain = not (args or kwargs or self.merged or self.disable_adapters)
        if not plain or self.training and self.module_dropout[NAME] or self.active_adapters != [NAME]:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        return result + self._get_delta_activations(NAME, x).to(result.dtype)


class LoHaLinear(_Undropped, loha.layer.Linear):
    pass


class LoKrLinear(_Undropped, lokr.layer.Linear):
    def _get_delta_activations(self, adapter_name: str, input: Tensor, *args, **kwargs) -> Tensor:
        """(w1 [a, b] kron w2 [c, d]) x, x [..., b * d] -> [..., a * c]: w2 works on each of b rows, w1 mixes the rows.

        A w2 of two factors has w1 between them, where the states are narrowest.
        """
        if self.training and self.rank_dropout[adapter_name]:
            return super()._get_delta_activations(adapter_name, input, *args, **kwargs)
        w1, (first, *second) = self._factors(adapter_name)
        x = self._cast_input_dtype(input, w1.dtype)
        rows = F.linear(x.reshape(-1, w1.shape[1], first.shape[1]), first)  # [n, b, c or r]
        rows = torch.bmm((w1 * self.scaling[adapter_name]).expand(len(rows), -1, -1), rows)  # [n, a, c or r]
        for factor in second:
            rows = F.linear(rows, factor)
        return rows.reshape(*input.shape[:-1], -1)

    def _factors(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """w1, and w2 as the matrices to apply one after the other, or as one where that is the cheaper way."""
        w1 = self.lokr_w1[name] if name in self.lokr_w1 else self.lokr_w1_a[name] @ self.lokr_w1_b[name]
        if name in self.lokr_w2:
            return w1, [self.lokr_w2[name]]
        out, into = self.lokr_w2_a[name], self.lokr_w2_b[name]  # [c, r], [r, d]
        (c, r), d = out.shape, into.shape[1]
        return w1, [into, out] if r * (c + d) < c * d else [out @ into]


class DoraUpdate(DoraLinearLayer):
    """A DoRA's update as merging and ComfyUI take it: of the base weight alone, in proportion to a strength.

    PEFT's keeps the magnitudes at every strength, and rescales what other adapters add to the same module.
    """

    strength = 1.0

    def forward(self, x: Tensor, *, base_result: Tensor | None = None, **kwargs) -> Tensor:
        return self.strength * super().forward(x, **kwargs)


CHEAPER = {lora.Linear: LoraLinear, loha.layer.Linear: LoHaLinear, lokr.layer.Linear: LoKrLinear}
"""For an adapter that is trained, alone."""
ADDITIVE = {DoraLinearLayer: DoraUpdate}
"""For adapters that are scaled, or several."""


def exchange(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Give the adapter layers of a model other forwards, in place."""
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
