"""Attention by blocks of queries against torch's, which holds all scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siliconlm.config import ModelConfig
from siliconlm.model.attention import block_attention
from siliconlm.model.decoder import Decoder

SIZES = {  # B, H, K, T, D and the block
    "whole blocks": (2, 4, 2, 32, 8, 16),
    "a rest": (2, 3, 3, 37, 8, 16),
    "one key head": (1, 3, 1, 33, 16, 8),
    "one block, longer than the sequence": (1, 2, 2, 5, 4, 256),
    "one query at a time": (2, 2, 1, 6, 4, 1),
}


def inputs(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, strided as the projections leave them; and a gradient of the result."""
    batch, heads, kv_heads, tokens, width, _ = sizes
    generator = torch.Generator().manual_seed(5)

    def made(count: int) -> Tensor:
        return torch.randn(batch, tokens, count, width, generator=generator, dtype=dtype).transpose(1, 2)

    return [made(count).requires_grad_() for count in (heads, kv_heads, kv_heads)], made(heads)


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_result_and_its_gradients_are_torchs(sizes: tuple[int, ...]) -> None:
    given, dy = inputs(sizes, torch.float64)
    ours, theirs = block_attention(*given, sizes[-1]), torchs(*given)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for got, expected in zip(torch.autograd.grad(ours, given, dy), torch.autograd.grad(theirs, given, dy), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_large_scores_overflow_nothing() -> None:
    given, dy = inputs((1, 2, 1, 20, 8, 8), torch.float32)
    with torch.no_grad():
        given[0].mul_(1000)
    ours = block_attention(*given, 8)
    torch.testing.assert_close(ours, torchs(*given), atol=1e-3, rtol=1e-3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(ours, given, dy))


def test_half_precision_is_as_near_as_torchs() -> None:
    given, dy = inputs((2, 4, 2, 48, 16, 16), torch.float32)
    exact = [torchs(*given), *torch.autograd.grad(torchs(*given), given, dy)]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = block_attention(*given, 16), torchs(*given)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    near = [ours, *torch.autograd.grad(ours, given, dy.bfloat16())]
    like = [theirs, *torch.autograd.grad(theirs, given, dy.bfloat16())]
    for right, got, other in zip(exact, near, like, strict=True):
        assert (got - right).norm() < 1.5 * (other - right).norm() < 0.05 * right.norm()


def test_only_a_blocks_scores_are_there_at_a_time() -> None:
    """A sequence of 512: nothing of its 512 x 512 scores is kept, and no tensor is larger than a block's."""
    given, dy = inputs((1, 1, 1, 512, 8, 32), torch.float32)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block_attention(*given, 32)
    assert kept and max(kept) <= 512 * 8
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(y, given, dy)
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) <= 3 * 32 * 512 * 4


def test_a_decoder_trains_alike_by_blocks(shape: ModelConfig, random_model: Callable[..., Decoder]) -> None:
    ids = torch.randint(shape.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for query_block in (0, 8):
        model = random_model(shape).train()
        model.model.suit(query_block, own_norm=False, remake=False)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
