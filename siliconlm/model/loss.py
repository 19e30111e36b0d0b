"""Cross-entropy of the output head without all its logits: a chunk of tokens at a time.

Letters as in decoder.py; N is the tokens of a micro-batch, R those of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of a chunk's logits in float32. On 2 CPU cores as fast as all at once; 8 MiB took up to twice as long.
CHUNK_BYTES = 32 << 20


def chunk_rows(vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Tokens in a chunk."""
    return max(1, chunk_bytes // (4 * vocab_size))


def chunked_loss(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """The sum over tokens of cross-entropy(x weight', targets) in nats, float32; a target of -100 does not count.

    Matmuls in autocast's precision, the rest in float32. The gradients are made on the way forward, while a chunk's
    logits are there, and scaled on the way back, as in Liger (Hsu et al. 2024, arXiv 2410.10989): no product is
    computed twice, but the loss can go backward only once. They are as large as `x` and the weight.
    """
    return _ChunkedLoss.apply(x_NC, weight_VC, targets_N, chunk_rows(len(weight_VC), chunk_bytes))  # type: ignore[no-untyped-call]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, rows: int) -> Tensor:
        x, weight = (tensor.to(matmul_dtype(x_NC)) for tensor in (x_NC, weight_VC))
        dx_NC = torch.empty_like(x_NC)
        dweight_VC = torch.zeros_like(weight_VC) if ctx.needs_input_grad[1] else None
        chunks = zip(x.split(rows), targets_N.split(rows), dx_NC.split(rows), strict=True)
        losses = [_chunk(x_RC, weight, targets_R, dx_RC, dweight_VC) for x_RC, targets_R, dx_RC in chunks]
        ctx.gradients = dx_NC, dweight_VC
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx_NC, dweight_VC = ctx.gradients
        ctx.gradients = None  # scaled in place, so that there is no second copy; a second time would scale it again
        return dx_NC.mul_(gradient), None if dweight_VC is None else dweight_VC.mul_(gradient), None, None


def _chunk(x_RC: Tensor, weight_VC: Tensor, targets_R: Tensor, dx_RC: Tensor, dweight_VC: Tensor | None) -> Tensor:
    """The loss of a chunk. Writes the gradient of its x, and adds to the weight's."""
    exact = torch.promote_types(x_RC.dtype, torch.float32)
    log_p_RV = F.log_softmax(x_RC @ weight_VC.T, dim=1, dtype=exact)
    loss = F.nll_loss(log_p_RV, targets_R, reduction="sum")
    dlogits_RV = _less_one_at(targets_R, log_p_RV.exp_()).to(x_RC.dtype)
    counted_R1 = (targets_R >= 0)[:, None]
    dx_RC.copy_(dlogits_RV @ weight_VC).mul_(counted_R1)
    if dweight_VC is not None:
        _add_product(dweight_VC, dlogits_RV.T, x_RC * counted_R1)
    return loss


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What autocast, if it is on, makes of a matmul's operands."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def _less_one_at(targets_R: Tensor, p_RV: Tensor) -> Tensor:
    """Softmax minus the one-hot targets, in place: the gradient of the logits."""
    targets_R1 = targets_R.clamp(min=0)[:, None]
    return p_RV.scatter_add_(1, targets_R1, torch.full_like(targets_R1, -1, dtype=p_RV.dtype))


def _add_product(sum_VC: Tensor, left_VR: Tensor, right_RC: Tensor) -> None:
    if left_VR.dtype == sum_VC.dtype:
        sum_VC.addmm_(left_VR, right_RC)
    else:
        sum_VC += left_VR @ right_RC
