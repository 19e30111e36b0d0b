"""RMSNorm and rotary positions with backward passes of our own: torch's composed ones read and keep far more.

Forward and backward together they take 0.3 to 0.6 of the time on a CPU (docs/experiments.md), and half of the memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_C: Tensor, eps: float, own: bool) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 inside (Zhang & Sennrich 2019).

    `own`: with gradients, the one here, which keeps a single tensor like x. Without them torch's is as good.
    """
    if own and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight_C, eps)  # type: ignore[no-untyped-call]
    # Not torch.ops.aten._fused_rms_norm: it has no backward on Apple GPUs. F.rms_norm picks what is safe there.
    return F.rms_norm(x, weight_C.shape, weight_C.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        exact = _exact(x)
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        unit = (exact * scale).to(x.dtype)
        ctx.save_for_backward(unit, weight_C, scale)
        return unit * weight_C.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        kept, weight_C, scale = ctx.saved_tensors
        unit, dy, width = _exact(kept), _exact(dy), dy.size(-1)
        products_NC = (dy * unit).reshape(-1, width)
        along = (products_NC @ weight_C.to(unit.dtype)).view(scale.shape)
        dx = (dy * weight_C).addcmul_(unit, along, value=-1 / width).mul_(scale)
        return dx.to(kept.dtype), products_NC.sum(0).to(weight_C.dtype), None


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x_BTHD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (d, d + D/2) of each head by the angles of its place (Su et al. 2021; Llama and Qwen layout).

    `angles` are the cosines and the sines, [T, 1, D]; the first half of the sines is negative.
    """
    return _Rotation.apply(x_BTHD, *angles)  # type: ignore[no-untyped-call]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _turned(x_BTHD, cos_T1D, sin_T1D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHD: Tensor) -> tuple[Tensor, None, None]:
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _turned(dy_BTHD, cos_T1D, -sin_T1D), None, None


def _turned(x_BTHD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    exact_BTHD = _exact(x_BTHD)
    # Repeated for each head, a place's numbers lie in one row, which a CPU goes through twice as fast.
    cos_THD, sin_THD = (part.to(exact_BTHD.dtype).expand(x_BTHD.shape[1:]).contiguous() for part in (cos_T1D, sin_T1D))
    swapped_BTHD = exact_BTHD.roll(x_BTHD.size(-1) // 2, -1)
    return (exact_BTHD * cos_THD).addcmul_(swapped_BTHD, sin_THD).to(x_BTHD.dtype)
