"""The elementwise steps of a layer, in forms that keep less for the backward pass and touch memory less often.

Each equals upstream's chain of operations. Where autograd would keep every link of the chain, these keep the inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FrozenRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rms = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rms)
        return (wide * rms).mul_(weight).type_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rms = ctx.saved_tensors
        wide = grad.float() * weight
        along = (wide * x).mean(-1, keepdim=True)
        return wide.addcmul_(x, along.mul_(rms * rms), value=-1).mul_(rms).type_as(x), None, None


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """x [..., d] over its root mean square, times the weight [d] of a diffusers RMSNorm.

    GPUs have one kernel for it; on the CPU torch takes it apart and keeps the pieces, so there it is ours.
    """
    if x.is_cuda or norm.weight.requires_grad:
        return F.rms_norm(x, norm.dim, norm.weight, norm.eps).type_as(x)
    return _FrozenRMSNorm.apply(x, norm.weight, norm.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; silu(gate), a third of a layer's widest states, is computed again instead of kept."""
    return _SwiGLU.apply(gate, up)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    out = x.float() * cos
    for half, other, sign in zip(out.chunk(2, -1), reversed(x.chunk(2, -1)), (-way, way), strict=True):
        half.addcmul_(other, sin, value=sign)
    return out.type_as(x)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x [b, n, h, d], the dimension split in halves as in Qwen3.

    rotary: cosines [n, 1, d] and sines [n, 1, d / 2].
    """
    return _Rotate.apply(x, *rotary)
