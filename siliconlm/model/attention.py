"""Causal attention by blocks of queries, for devices that would keep all scores for the backward pass.

Apple GPUs train through torch's plain path, which holds several float32 copies of all T x T scores per layer. Here
only a block's scores are there at a time, and the backward pass computes them again from the sum of their
exponentials, as FlashAttention does (Dao et al. 2022, arXiv 2205.14135).

Letters as in decoder.py; N is B * K, G the query heads of a key head, R the queries of a block, S the keys they see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from siliconlm.model.loss import matmul_dtype


def block_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, block: int, documents_BT: Tensor | None = None
) -> Tensor:
    """softmax(q k' / sqrt(D)) v over each query's own and earlier places, [B, H, T, D]; heads of queries share keys.

    With `documents_BT`, over those places of the query's document alone. Matmuls in autocast's precision, the softmax
    in float32. Its memory grows with T * `block`.
    """
    dtype = matmul_dtype(v_BKTD)
    q, k, v = (part.to(dtype) for part in (q_BHTD, k_BKTD, v_BKTD))
    return _BlockAttention.apply(q, k, v, block, documents_BT)  # type: ignore[no-untyped-call]


def same_document(queries_BR: Tensor, keys_BS: Tensor) -> Tensor:
    """Whether a query's document is a key's: [B, R, S]."""
    return queries_BR[:, :, None] == keys_BS[:, None]


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, block: int, documents_BT: Tensor | None
    ) -> Tensor:
        documents_NT = _of_heads(documents_BT, k_BKTD)
        q_NGTD, (k_NTD, v_NTD) = _grouped(q_BHTD, k_BKTD), (part.flatten(0, 1) for part in (k_BKTD, v_BKTD))
        y_NGTD, sums_NGT1 = torch.empty_like(q_NGTD), _float(q_NGTD.new_empty(*q_NGTD.shape[:3], 1))
        for rows, end in _blocks(q_NGTD, block):
            scores_NGRS = _scores(q_NGTD[:, :, rows], k_NTD[:, :end], documents_NT)
            sums_NGT1[:, :, rows] = scores_NGRS.logsumexp(-1, keepdim=True)
            p_NGRS = (scores_NGRS - sums_NGT1[:, :, rows]).exp_()
            y_NGTD[:, :, rows] = _product(p_NGRS.to(v_NTD.dtype), v_NTD[:, :end])
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, y_NGTD, sums_NGT1, documents_NT)
        ctx.block = block
        return y_NGTD.view(q_BHTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTD, k_BKTD, v_BKTD, y_NGTD, sums_NGT1, documents_NT = ctx.saved_tensors
        q_NGTD, dy_NGTD = _grouped(q_BHTD, k_BKTD), _grouped(dy_BHTD, k_BKTD)
        k_NTD, v_NTD = (part.flatten(0, 1) for part in (k_BKTD, v_BKTD))
        dq_NGTD, dk_NTD, dv_NTD = torch.empty_like(q_NGTD), torch.zeros_like(k_NTD), torch.zeros_like(v_NTD)
        shares_NGT1 = (_float(dy_NGTD) * y_NGTD).sum(-1, keepdim=True)
        scale = 1 / math.sqrt(q_BHTD.size(-1))
        for rows, end in _blocks(q_NGTD, ctx.block):
            q_NGRD, dy_NGRD = q_NGTD[:, :, rows], dy_NGTD[:, :, rows]
            p_NGRS = (_scores(q_NGRD, k_NTD[:, :end], documents_NT) - sums_NGT1[:, :, rows]).exp_()
            dv_NTD[:, :end] += _over_queries(p_NGRS.to(v_NTD.dtype), dy_NGRD)
            dp_NGRS = _float(_product(dy_NGRD, v_NTD[:, :end].mT))
            dscores_NGRS = ((dp_NGRS - shares_NGT1[:, :, rows]) * p_NGRS * scale).to(k_NTD.dtype)
            dq_NGTD[:, :, rows] = _product(dscores_NGRS, k_NTD[:, :end])
            dk_NTD[:, :end] += _over_queries(dscores_NGRS, q_NGRD)
        return dq_NGTD.view(q_BHTD.shape), dk_NTD.view(k_BKTD.shape), dv_NTD.view(v_BKTD.shape), None, None


def _grouped(q_BHTD: Tensor, k_BKTD: Tensor) -> Tensor:
    """[B, H, T, D] -> [B * K, G, T, D]: heads side by side that read the same keys."""
    batch, _, tokens, width = q_BHTD.shape
    return q_BHTD.reshape(batch * k_BKTD.size(1), -1, tokens, width)


def _blocks(q_NGTD: Tensor, block: int) -> Iterator[tuple[slice, int]]:
    """Each block of queries, and how many keys it sees."""
    tokens = q_NGTD.size(2)
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        yield slice(start, end), end


def _of_heads(documents_BT: Tensor | None, k_BKTD: Tensor) -> Tensor | None:
    return None if documents_BT is None else documents_BT.repeat_interleave(k_BKTD.size(1), 0)


def _scores(q_NGRD: Tensor, k_NSD: Tensor, documents_NT: Tensor | None) -> Tensor:
    """Scores of the last places of a sequence, -inf where a key comes later or is another document's, float32 (or
    more) [N, G, R, S]."""
    scores_NGRS = _float(_product(q_NGRD, k_NSD.mT)) / math.sqrt(q_NGRD.size(-1))
    rows = q_NGRD.size(2)
    later = torch.ones(rows, rows, dtype=torch.bool, device=q_NGRD.device).triu_(1)
    scores_NGRS[..., -rows:].masked_fill_(later, -torch.inf)
    if documents_NT is not None:
        end = k_NSD.size(1)
        same_NRS = same_document(documents_NT[:, end - rows : end], documents_NT[:, :end])
        scores_NGRS.masked_fill_(~same_NRS[:, None], -torch.inf)
    return scores_NGRS


def _product(left_NGRX: Tensor, right_NXY: Tensor) -> Tensor:
    """One matmul per key head for all its query heads: [N, G, R, Y]."""
    return torch.bmm(left_NGRX.flatten(1, 2), right_NXY).unflatten(1, left_NGRX.shape[1:3])


def _over_queries(left_NGRX: Tensor, right_NGRY: Tensor) -> Tensor:
    """left' right, summed over the queries of all heads that share a key head: [N, X, Y]."""
    return torch.bmm(left_NGRX.flatten(1, 2).mT, right_NGRY.flatten(1, 2))


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
