"""Operators whose backward passes read and keep less than those that torch composes (docs/experiments.md has figures).

RMSNorm, rotary positions and SwiGLU; and `remade`, for what is cheap to make a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_C: Tensor, eps: float, own: bool) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 inside (Zhang & Sennrich 2019).

    `own`: with gradients, the one here, which keeps x alone. Without them torch's is as good.
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
        ctx.save_for_backward(x, weight_C, scale)
        return (exact * scale).to(x.dtype) * weight_C.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_C, scale = ctx.saved_tensors
        unit, dy, width = _exact(x) * scale, _exact(dy), dy.size(-1)
        products_NC = (dy * unit).reshape(-1, width)
        along = (products_NC @ weight_C.to(unit.dtype)).view(scale.shape)
        dx = (dy * weight_C).addcmul_(unit, along, value=-1 / width).mul_(scale)
        return dx.to(x.dtype), products_NC.sum(0).to(weight_C.dtype), None


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x_BTHD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (d, d + D/2) of each head by the angles of its place (Su et al. 2021; Llama and Qwen layout).

    `angles` are the cosines and the sines, [T, 1, D] or [B, T, 1, D]; the first half of the sines is negative.
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
    exact_BTHD, shape = _exact(x_BTHD), x_BTHD.shape[-cos_T1D.dim() :]
    # Repeated for each head, a place's numbers lie in one row, which a CPU goes through twice as fast.
    cos_THD, sin_THD = (part.to(exact_BTHD.dtype).expand(shape).contiguous() for part in (cos_T1D, sin_T1D))
    swapped_BTHD = exact_BTHD.roll(x_BTHD.size(-1) // 2, -1)
    return (exact_BTHD * cos_THD).addcmul_(swapped_BTHD, sin_THD).to(x_BTHD.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; keeps these two alone."""
    return _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


@contextmanager
def remade(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """What is computed from a contiguous `tensor` in here keeps no tensor for its backward pass: it calls `make`.

    `make` has to give the same numbers again, and keeps what it needs. Once is enough for all that ask.
    """
    again, storage, numbers = _Again(make), tensor.untyped_storage()._cdata, tensor.numel()

    def pack(kept: Tensor) -> Tensor | tuple[_Again, torch.Size]:
        same = kept.untyped_storage()._cdata == storage and kept.numel() == numbers and kept.is_contiguous()
        return (again, kept.shape) if same else kept

    def unpack(kept: Tensor | tuple[_Again, torch.Size]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0]().view(kept[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@dataclass(slots=True)
class _Again:
    """Goes, and what it made with it, when the backward pass is through with all that asked for it."""

    make: Callable[[], Tensor]
    made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        return self.made
