"""The frozen transformer in 4 or 8 bits, by bitsandbytes (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Only the large products of the layers are packed; embeddings, norms and the convolutions at the ends stay as they are.
"""

from importlib.util import find_spec

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acestep_lora.adapters import Adapter
from acestep_lora.errors import UserError

KINDS = ("none", "nf4", "int8")
_BLOCK = 64
"""Weights that share one scale in 4 bits, bitsandbytes' default."""


def check(kind: str, adapter: Adapter) -> None:
    """Raise UserError for a kind that is none, and for adapters that need the whole weight."""
    if kind not in KINDS:
        raise UserError(f"model.quantize={kind} is none of {', '.join(KINDS)}.")
    if kind == "none":
        return
    if find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantize={kind} needs bitsandbytes, which this installation lacks: use none.")
    if adapter.config is None or adapter.config.func is peft.LoHaConfig:
        raise UserError(
            f"adapter={adapter.name} does not train on packed weights: set model.quantize=none or adapter=lora."
        )
    if kind == "int8" and adapter.config.keywords.get("use_dora"):
        raise UserError("adapter=dora does not train on int8 weights (bitsandbytes loses their scales): use nf4.")


def _packed(linear: nn.Linear, kind: str) -> nn.Module:
    """bitsandbytes' counterpart of a linear layer, to be packed as it moves to its device."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    sizes, weight = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.data
    with torch.device("meta"):
        if kind == "nf4":
            packed = Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4")
            packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            packed = Linear8bitLt(*sizes, has_fp16_weights=False)
            packed.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    packed.bias = linear.bias
    return packed


def quantize(dit: nn.Module, kind: str, device: str | torch.device) -> None:
    """Pack the linear layers of a transformer's blocks, one by one, on the device they are for."""
    for block in dit.layers:
        for name, linear in [item for item in block.named_modules() if type(item[1]) is nn.Linear]:
            block.set_submodule(name, _packed(linear, kind).to(device).train(linear.training))
    dit.is_loaded_in_4bit, dit.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # what PEFT asks for


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer, unpacked where it is packed."""
    if type(linear) is nn.Linear:
        return linear.weight
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(linear.weight, state=getattr(linear, "state", None))


class _Unpacked(torch.autograd.Function):
    """What bitsandbytes' products do to memory: the weight is unpacked for the product and dropped, both ways."""

    @staticmethod
    def forward(ctx, x: Tensor, out_features: int) -> Tensor:
        ctx.sizes = out_features, x.shape[-1]
        return F.linear(x, torch.empty(ctx.sizes, dtype=x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ torch.empty(ctx.sizes, dtype=grad.dtype), None


class PackedShape(nn.Module):
    """A packed linear layer under fake tensors, which bitsandbytes' own cannot be: its bytes and its products."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        count = linear.weight.numel()
        self.packed = nn.Buffer(torch.empty(count // 2 if kind == "nf4" else count, dtype=torch.uint8))
        self.scales = nn.Buffer(torch.empty(count // _BLOCK if kind == "nf4" else linear.out_features))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """As DoRA asks for it, to norm it."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Unpacked.apply(x.to(self.dtype), self.out_features)
