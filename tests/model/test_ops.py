"""Operators of our own against torch's composed ones, and what the backward pass need not keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siliconlm.config import ModelConfig
from siliconlm.model.decoder import Decoder, Rotary
from siliconlm.model.families import FEATURES
from siliconlm.model.ops import remade, rms_norm, rotate, swiglu
from siliconlm.tuning.memory import Ledger

Random = Callable[..., Decoder]


def made(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def torchs(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 5, 3, 8), (7, 2)])
def test_the_norm_and_its_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    x, weight, dy = made(*shape), made(shape[-1]), made(*shape).detach()
    ours, theirs = rms_norm(x, weight, 1e-6, own=True), torchs(x, weight)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(ours, (x, weight), dy), torch.autograd.grad(theirs, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_the_norm_takes_strided_inputs_and_gradients() -> None:
    x, weight, dy = made(4, 3, 6), made(6), made(3, 4, 6).detach().transpose(0, 1)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    got = torch.autograd.grad(rms_norm(strided, weight, 1e-6, own=True), (x, weight), dy)
    torch.testing.assert_close(got, torch.autograd.grad(torchs(x, weight), (x, weight), dy), atol=1e-12, rtol=1e-12)


def test_nothing_gives_nothing() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    rms_norm(x, weight, 1e-6, own=True).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_in_half_precision_the_norm_is_computed_in_float32() -> None:
    """Squares of numbers like these overflow float16."""
    x, weight = made(2, 8).detach() * 1e4, made(8).detach().float()
    half = x.to(torch.float16).requires_grad_()
    y = rms_norm(half, weight.requires_grad_(), 1e-6, own=True)
    y.sum().backward()
    assert y.dtype == half.dtype and weight.grad is not None and weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), torchs(x, weight.double()), atol=2e-3, rtol=2e-3)


def test_the_norm_keeps_one_tensor_of_its_inputs_size() -> None:
    kept: list[Tensor] = []
    x, weight = made(16, 8, dtype=torch.float32), made(8, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, 1e-6, own=True)
    assert [tensor.numel() for tensor in kept if tensor.numel() >= x.numel()] == [x.numel()]


def test_the_rotation_and_its_gradients_are_the_formulas() -> None:
    x, dy = made(2, 5, 3, 8), made(2, 5, 3, 8).detach()
    angles_TD = torch.outer(torch.arange(5.0), 100.0 ** -(torch.arange(0, 8, 2) / 8)).repeat(1, 2).double()
    cos, sin = angles_TD.cos()[:, None], angles_TD.sin()[:, None]
    left, right = x.chunk(2, dim=-1)
    theirs = x * cos + torch.cat((-right, left), dim=-1) * sin
    ours = rotate(x, (cos, torch.cat((-sin[..., :4], sin[..., 4:]), -1)))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    expected, got = (torch.autograd.grad(y, x, dy)[0] for y in (theirs, ours))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_rotary_angles_are_of_the_places_asked_for() -> None:
    rotary = Rotary(ModelConfig(head_dim=8, context=16, rope_theta=100.0))
    cos, sin = rotary(3, 2)
    angles = 3 * 100.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    torch.testing.assert_close(cos[0, 0].double(), angles.cos().repeat(2), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sin[0, 0].double(), torch.cat((-angles.sin(), angles.sin())), atol=1e-6, rtol=1e-6)


def test_swiglu_and_its_gradients_are_the_formulas() -> None:
    gate, up, dy = made(3, 5), made(3, 7)[:, :5], made(5, 3).detach().mT
    ours, theirs = swiglu(gate, up), F.silu(gate) * up
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    got, expected = (torch.autograd.grad(y, (gate, up), dy) for y in (ours, theirs))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


WIDE = {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_kv_head": 2, "n_ff": 320, "vocab_size": 64, "context": 16}


@pytest.mark.parametrize("features", [{}, FEATURES["gpt2"]], ids=["qwen3", "gpt2"])
def test_a_model_trains_the_same_with_what_suits_a_device(features: dict[str, Any], random_model: Random) -> None:
    model = random_model(ModelConfig(**(WIDE | ({"n_kv_head": 4} if features else {}) | features)))
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    gradients = []
    for own_norm, remake in ((False, False), (True, False), (False, True), (True, True)):
        model.model.suit(0, own_norm, remake)
        model.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("features", [{}, FEATURES["gpt2"]], ids=["qwen3", "gpt2"])
def test_what_is_made_again_is_not_kept(features: dict[str, Any], random_model: Random) -> None:
    """Per block: what the norms and the activation gave, and of SwiGLU what silu gave."""
    config = ModelConfig(**(WIDE | ({"n_kv_head": 4} if features else {}) | features))
    model = random_model(config)
    sizes = []
    for remake in (False, True):
        model.model.suit(0, own_norm=True, remake=remake)
        sizes.append(kept_bytes(model))
    tokens, activations = 2 * 16, 1 if features else 2
    assert sizes[0] - sizes[1] == 4 * tokens * config.n_layer * (2 * config.n_embd + activations * config.n_ff)


def kept_bytes(model: Decoder) -> int:
    """What is there after a forward pass and was not before it."""
    with Ledger(torch.device("cpu"), None, False, False) as ledger:
        logits = model(torch.zeros(2, 16, dtype=torch.long))
    assert logits.requires_grad
    return ledger.total


def test_one_that_is_made_again_serves_all_that_ask() -> None:
    x, weights, calls = made(4, 6), [made(6, 6), made(6, 6)], 0

    def make() -> Tensor:
        nonlocal calls
        calls += 1
        return x.tanh()

    y = make()
    with remade(y, make):
        products = [y @ weight for weight in weights]
    sum(products).sum().backward()  # type: ignore[union-attr]
    assert calls == 2, "once forward, once backward"
    for weight in weights:
        torch.testing.assert_close(weight.grad, x.detach().tanh().sum(0)[:, None].expand(6, 6))


def test_nothing_else_is_made_again() -> None:
    x, other = made(4, 4), made(4, 4)
    y = x.exp()
    with remade(y, lambda: pytest.fail("asked for a tensor that is kept")):
        z = other.exp() * 2
    z.sum().backward()
    torch.testing.assert_close(other.grad, 2 * other.detach().exp())
