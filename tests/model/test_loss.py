"""The chunked loss against the plain one in float64, in every situation that training brings, and what it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siliconlm.config import ModelConfig
from siliconlm.model import loss as module
from siliconlm.model.decoder import Decoder
from siliconlm.model.loss import chunk_rows, chunked_loss

Random = Callable[..., Decoder]
SIZES = [(37, 24, 331, 7), (37, 24, 331, 37), (64, 16, 257, 1), (1, 8, 5, 3), (5, 3, 1, 2)]  # N, C, V, R


def drawn(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(rows, width, generator=generator) for rows in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[2::5] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-100, reduction="sum")


def in_double(x: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    """The loss and its gradients by autograd alone, in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    loss = F.cross_entropy(F.linear(*inputs), targets, ignore_index=-100, reduction="sum") * scale
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("scale", [1.0, 3e-4, 65_536.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_loss_and_gradients(size: tuple[int, int, int, int], scale: float) -> None:
    tokens, width, vocabulary, rows = size
    x, weight, targets = drawn(tokens, width, vocabulary)
    loss = chunked_loss(x, weight, targets, chunk_bytes=4 * vocabulary * rows) * scale
    loss.backward()
    want = in_double(x, weight, targets, scale)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    if vocabulary == 1:  # one word is certain
        assert not loss and not x.grad.any() and not weight.grad.any()
        return
    for got, right in zip((loss.detach(), x.grad, weight.grad), want, strict=True):
        assert off(got, right) < 1e-5
    assert not x.grad[targets == -100].any()


def test_in_double_it_is_exact() -> None:
    x, weight, targets = drawn(37, 24, 331, torch.float64)
    loss = chunked_loss(x, weight, targets, chunk_bytes=4 * 331 * 7)
    for got, right in zip(
        (loss.detach(), *torch.autograd.grad(loss, (x, weight))), in_double(x, weight, targets), strict=True
    ):
        torch.testing.assert_close(got, right, atol=1e-12, rtol=1e-12)


def test_all_targets_ignored() -> None:
    x, weight, targets = drawn(9, 8, 20)
    loss = chunked_loss(x, weight, torch.full_like(targets, -100), chunk_bytes=320)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_large_logits_overflow_nothing() -> None:
    x, weight, targets = drawn(9, 8, 20)
    loss = chunked_loss(x * 1000, weight, targets, chunk_bytes=320)
    gradient, right = torch.autograd.grad(loss, x)[0], in_double(x * 1000, weight, targets)
    assert off(loss.detach(), right[0]) < 1e-5 and off(gradient, right[1] * 1000) < 1e-4


def test_gradients_add_up_over_micro_batches() -> None:
    x, weight, targets = drawn(32, 8, 50)
    for part in torch.arange(32).split(8):
        (chunked_loss(x[part], weight, targets[part], chunk_bytes=600) / 32).backward()
    _, dx, dweight = in_double(x, weight, targets, 1 / 32)
    assert off(x.grad, dx) < 1e-5 and off(weight.grad, dweight) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_near_as_the_plain_loss(dtype: torch.dtype) -> None:
    """Many chunks: were the weight's gradient summed in 16 bits, it would drift with their number."""
    x, weight, targets = drawn(512, 48, 301)
    want = in_double(x, weight, targets)
    errors = {}
    for name, function in (("plain", plain_loss), ("chunked", lambda *args: chunked_loss(*args, 4 * 301 * 4))):
        with torch.autocast("cpu", dtype=dtype):
            loss = function(x, weight, targets)
        got = loss.detach(), *torch.autograd.grad(loss, (x, weight))
        assert [tensor.dtype for tensor in got] == [torch.float32] * 3
        errors[name] = [off(*pair) for pair in zip(got, want, strict=True)]
    assert max(errors["chunked"]) < 2 * max(errors["plain"]) < 0.02


def test_a_frozen_weight_has_no_gradient_made() -> None:
    x, weight, targets = drawn(9, 8, 20)
    frozen = weight.detach()
    with Held() as held:
        chunked_loss(x, frozen, targets).backward()
    assert "aten::addmm_" not in held.used and off(x.grad, in_double(x, weight, targets)[1]) < 1e-5


def test_it_goes_backward_once() -> None:
    """A second time would scale gradients that were scaled already."""
    x, weight, targets = drawn(9, 8, 20)
    loss = chunked_loss(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def test_a_chunk_is_never_empty() -> None:
    assert chunk_rows(1 << 40) == 1
    assert chunk_rows(4096) * 4096 * 4 == module.CHUNK_BYTES


# --- in a decoder ---------------------------------------------------------------------------------------------------


def batch(shape: ModelConfig) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(shape.vocab_size, (3, shape.context), generator=torch.Generator().manual_seed(2))
    targets = tokens.roll(-1, 1)
    targets[0, 5:9] = -100
    return tokens, targets


def test_a_decoder_has_the_same_gradients(
    shape: ModelConfig, random_model: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied and free heads; the trunk's gradients too."""
    monkeypatch.setattr("siliconlm.model.loss.chunk_rows", lambda *_: 7)
    plain, chunked = random_model(shape), random_model(shape)
    losses = [model.loss(*batch(shape), chunked=model is chunked) for model in (plain, chunked)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], random_model(shape).losses(*batch(shape)).sum())
    torch.testing.assert_close(losses[1], losses[0])
    for (name, weight), other in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # on which attention does not depend: nothing but rounding
            scale = weight.grad.abs().max()
            torch.testing.assert_close(other.grad / scale, weight.grad / scale, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients_come_by_chunks(
    shape: ModelConfig, random_model: Random, monkeypatch: pytest.MonkeyPatch, mode: Callable[[], Any]
) -> None:
    model, rows = random_model(shape), []
    whole = model.losses(*batch(shape)).detach()
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr("siliconlm.model.decoder.chunk_rows", lambda _: 40)
    with mode():
        torch.testing.assert_close(model.losses(*batch(shape)), whole)
        assert rows == [40, 40, 16]
        torch.testing.assert_close(model.loss(*batch(shape), chunked=True), whole.sum())


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made in it that are alive, at most; views of the inputs are nothing new."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in inputs}
        self.peak = 0
        self.used: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.used.add(op._schema.name)
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.sizes.pop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_it_holds_two_chunks_of_logits_at_most() -> None:
    tokens, width, vocabulary, rows = 512, 4, 6000, 32
    x, weight, targets = drawn(tokens, width, vocabulary)
    peaks = {}
    for name, function in (
        ("plain", plain_loss),
        ("chunked", lambda *args: chunked_loss(*args, chunk_bytes=4 * vocabulary * rows)),
    ):
        with Held(x, weight, targets) as held:
            torch.autograd.grad(function(x, weight, targets), (x, weight))
        peaks[name] = held.peak
    logits = 4 * tokens * vocabulary
    gradients = 4 * (x.numel() + weight.numel())
    assert peaks["plain"] - gradients > 2 * logits
    assert peaks["chunked"] - gradients < 1.05 * 2 * logits * rows / tokens  # 1/16 of the logits, twice
