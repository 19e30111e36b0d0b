"""RMSNorm and rotary positions of our own against torch's composed ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siliconlm.config import ModelConfig
from siliconlm.model.decoder import Decoder, Rotary
from siliconlm.model.ops import rms_norm, rotate


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


def test_a_model_trains_the_same_with_either_norm() -> None:
    model = Decoder(ModelConfig(n_layer=2, n_embd=32, n_ff=48, vocab_size=64, context=16))
    model.initialise(3)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    gradients = []
    for own in (False, True):
        model.model.suit(0, own_norm=own)
        model.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-5)
