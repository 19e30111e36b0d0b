"""Does this device compute what a CPU computes? Every operation that training and sampling use, small, in seconds.

GPUs have returned wrong numbers without a word: long matmuls on M1 and M2 (pytorch#177116), addcdiv_ on strided
tensors (#118115), dropout under checkpointing (#127676), float32 matmuls of 11 bits on M5 (mlx#3534). A failed check
names the feature to avoid; what does not fail stays on.

The witness is float64 on the CPU, so the checks mean something on a CPU too. Where the question is what a feature
(bfloat16, checkpointing) changes, the witness is the same device without it: one fault, one verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliconlm.config import ModelConfig, OptimConfig
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import DTYPES, Device, is_out_of_memory, plain_words
from siliconlm.hardware.doctor import MATMUL_CAP
from siliconlm.inference.decode import OneToken
from siliconlm.model.decoder import Attention, Block, Cache, Decoder, Rotary, Rows
from siliconlm.model.loss import chunked_loss
from siliconlm.model.ops import rms_norm, rotate
from siliconlm.training.optim import AdamW, Muon, build, orthogonalise

Feature = Literal[
    "always",
    "full_precision",
    "long_matmul",
    "grouped_queries",
    "cached_decoding",
    "gpt2_shape",
    "muon",
    "fused_adamw",
    "unfused_adamw",
    "averaging",
    "dropout",
    "checkpointing",
    "chunked_loss",
    "bfloat16",
    "float16",
]

INSTEAD: dict[Feature, str] = {
    "always": "train on another device (--device)",
    "full_precision": "expect about three digits where devices are compared; training bears it",
    "long_matmul": f"at most {MATMUL_CAP:,} tokens in a micro-batch and rows in the vocabulary",
    "grouped_queries": "model.n_kv_head equal to model.n_head",
    "cached_decoding": "sample on another device (--device)",
    "gpt2_shape": "the default shape (RMSNorm, rotary positions, SwiGLU)",
    "muon": "optim.name adamw",
    "fused_adamw": "AdamW that is not fused",
    "unfused_adamw": "fused AdamW",
    "averaging": "train.ema 0",
    "dropout": "model.dropout 0",
    "checkpointing": "a smaller micro-batch, without checkpointing",
    "chunked_loss": "the plain loss",
    "bfloat16": "float32",
    "float16": "float32",
}
"""What to do where a feature fails its check."""

ROUNDING = 1e-3  # largest error, in root mean squares of the right answer; float32 on a CPU stays under 5e-5
COARSE = 0.05  # for 8 to 11 bits: length of the error over length of the right answer
PRECISION = 1e-3  # absolute, of a 256x256 product of normal numbers: about 4e-5 is good, 5e-2 is 11 bits (mlx#3534)
REDUCED = 100.0  # how much more the checks with matmuls allow where float32 has 11 bits; whole models come to 0.06
POISON = 1000.0  # stands behind matmul operands; a kernel that reads too far (pytorch#177116) is then far off

Named = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]
Distance = Callable[[Tensor, Tensor], float]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check found. `error` and `limit` have no unit (see the distances); an error of inf is no number at all.

    `needed` is the feature that must be avoided where the check failed, `detail` says what was wrong.
    """

    name: str
    passed: bool
    error: float
    limit: float
    needed: Feature
    detail: str = ""


def run(device: Device) -> Iterator[Verdict]:
    """Check the device's arithmetic, one verdict at a time. About 3 s and 450 MB on a CPU.

    Seeds torch's generators. An operation that the device lacks or refuses is a failed verdict. Raises SiliconError
    (out_of_memory) when memory ran out, which says nothing of the arithmetic. A driver can end the whole process
    (pytorch#149325), so a command that must survive runs this in a child process.
    """
    broken: set[Feature] = set()
    slack = 1.0
    for check in checks(device):
        if broken & check.after:
            continue  # made of parts that are known to be wrong, it would tell nothing new
        limit = check.limit * (slack if check.matmuls else 1.0)
        verdict = _judge(check, device, limit)
        if not verdict.passed:
            broken.add(check.needed)
        if check.needed == "full_precision" and not verdict.passed:
            slack = REDUCED
        yield verdict


def gates(verdicts: Iterable[Verdict]) -> dict[str, str]:
    """Each feature that must be avoided, with the first thing that speaks against it. `INSTEAD` says what to do."""
    reasons: dict[str, str] = {}
    for verdict in verdicts:
        if not verdict.passed:
            reasons.setdefault(verdict.needed, f"{verdict.name}: {verdict.detail}")
    return reasons


def _judge(check: Check, device: Device, limit: float) -> Verdict:
    try:
        pairs = check.compare(device)
        errors = {what: check.distance(*pair) for what, pair in pairs.items()}
    except RuntimeError as error:  # NotImplementedError, for an operator that is missing, is one too
        if is_out_of_memory(error):
            fix = "Close other programs and try again."
            raise SiliconError(f"no memory for the check of {check.name}", fix=fix, kind="out_of_memory") from error
        return Verdict(check.name, False, math.inf, limit, check.needed, plain_words(error))
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] <= limit:
        return Verdict(check.name, True, errors[worst], limit, check.needed)
    detail = f"{worst} is off by {errors[worst]:.2g} (limit {limit:.2g})"
    return Verdict(check.name, False, errors[worst], limit, check.needed, detail)


# --- comparing ------------------------------------------------------------------------------------------------------


class Place:
    """One side of a comparison: where it is computed and how precisely. Both sides draw the same numbers."""

    def __init__(self, device: torch.device | None, dtype: torch.dtype) -> None:
        self.device = device  # None is where torch makes its tensors: the CPU
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    @property
    def witness(self) -> bool:
        return self.dtype == torch.float64

    def put(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype if values.is_floating_point() else None)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers that can have a gradient, and behind them in memory as many that must not be read."""
        behind = torch.full(shape, POISON)
        values = torch.randn(shape, generator=self.generator) * scale
        return self.put(torch.cat((values, behind)))[: shape[0]].requires_grad_()

    def ids(self, high: int, *shape: int) -> Tensor:
        return self.put(torch.randint(high, shape, generator=self.generator))

    def module(self, module: Module) -> Module:
        """A module here, all of whose weights are drawn: those that begin as zero or one would hide something."""
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(torch.randn(weight.shape, generator=self.generator) * weight.size(-1) ** -0.5)
        return module.to(self.device, self.dtype)


@dataclass(frozen=True, slots=True)
class Check:
    """A comparison and how it is judged. `after`: pointless where one of these features has failed already."""

    name: str
    needed: Feature
    compare: Callable[[Device], Pairs]
    limit: float
    distance: Distance
    matmuls: bool = False
    after: AbstractSet[Feature] = frozenset()


def largest(got: Tensor, want: Tensor) -> float:
    """The largest error, in root mean squares of the right answer; inf where there is no number or another shape."""
    error = _error(got, want)
    return math.inf if error is None else float(error.abs().max() / _double(want).square().mean().sqrt().clamp(1e-30))


def overall(got: Tensor, want: Tensor) -> float:
    """The length of the error over the length of the right answer, which few digits do not disturb as much."""
    error = _error(got, want)
    return math.inf if error is None else float(error.norm() / _double(want).norm().clamp(1e-30))


def absolute(got: Tensor, want: Tensor) -> float:
    error = _error(got, want)
    return math.inf if error is None else float(error.abs().max())


def _error(got: Tensor, want: Tensor) -> Tensor | None:
    if got.shape != want.shape:
        return None
    error = _double(got) - _double(want)
    return error if error.isfinite().all() else None


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()  # in this order: Apple GPUs have no float64


def against_cpu(work: Callable[[Place], Named], device: Device) -> Pairs:
    """The same work in float32 on the device and in float64 on the CPU."""
    got = work(Place(device.torch_device, torch.float32))
    want = work(Place(None, torch.float64))
    return {what: (got[what], want[what]) for what in want}


def with_gradients(at: Place, result: Tensor, **inputs: Tensor) -> Named:
    """The result and the gradients of the inputs, for a random gradient that comes from above."""
    gradients = torch.autograd.grad(result, list(inputs.values()), at.normal(*result.shape).detach())
    named = {f"the gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"the result": result, **named}


def both_modes(at: Place, function: Callable[..., Tensor], **inputs: Tensor) -> Named:
    """With gradients, and without: Apple GPUs take other kernels for the second."""
    named = with_gradients(at, function(*inputs.values()), **inputs)
    with torch.no_grad():
        return {**named, "the result without gradients": function(*inputs.values())}


def truth(condition: Tensor | bool) -> tuple[Tensor, Tensor]:
    """A pair that is equal where something holds, and off by 1 where it does not."""
    return torch.as_tensor(condition).float(), torch.ones(())


# --- the operations -------------------------------------------------------------------------------------------------


def product(at: Place) -> Named:
    with torch.no_grad():
        return {"the largest element": at.normal(256, 256) @ at.normal(256, 256)}


def products(at: Place, lengths: tuple[int, ...]) -> Named:
    """Matrix products in the three layouts that a linear layer and its backward pass use."""
    named = {}
    for length in lengths:
        rows, columns, wide = at.normal(64, length), at.normal(length, 64), at.normal(64, length)
        with torch.no_grad():
            named[f"A B, {length:,} long,"] = rows @ columns
            named[f"A B', {length:,} long,"] = rows @ wide.T
            named[f"A' B, {length:,} long,"] = columns.T @ columns
    return named


def linear(at: Place, shape: tuple[int, ...], outputs: int, bias: bool) -> Named:
    inputs = {"x": at.normal(*shape), "the weight": at.normal(outputs, shape[-1], scale=shape[-1] ** -0.5)}
    if bias:
        inputs["the bias"] = at.normal(outputs)
    return both_modes(at, F.linear, **inputs)


def attention(at: Place, heads: int, kv_heads: int, query_block: int = 0) -> Named:
    """The whole causal sequence, strided as the projections leave it; by blocks of queries, where so many are given."""
    layer = _attention(heads, kv_heads, 64)
    layer.query_block = query_block
    shapes = {"the queries": (2, 96, heads, 64), "the keys": (2, 96, kv_heads, 64), "the values": (2, 96, kv_heads, 64)}
    inputs = {name: at.normal(*shape) for name, shape in shapes.items()}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)

    return both_modes(at, attend, **inputs)


CACHED = ((64, 0, 40), (64, 40, 12), (64, 40, 3), (64, 40, 1), (32, 40, 3), (32, 40, 1), (64, 1100, 1), (64, 4200, 1))
"""Head width, cached tokens, new tokens: Apple GPUs have other kernels for up to 8 new and for long pasts."""


def cached_attention(at: Place, heads: int, kv_heads: int) -> Named:
    """New tokens after cached ones: all new, chunks with a mask, and single ones."""
    named = {}
    with torch.inference_mode():
        for width, past, new in CACHED:
            layer = _attention(heads, kv_heads, width)
            cache = Cache(layer.config, 1, at.normal(1).device, at.dtype, size=past + new + 8)
            for held in (*cache.keys, *cache.values):
                held[:, :, :past] = at.normal(1, kv_heads, past, width) if past else 0.0
            cache.length = past
            q, k, v = (at.normal(1, new, count, width).transpose(1, 2) for count in (heads, kv_heads, kv_heads))
            named[f"{new} after {past:,}, heads of {width},"] = layer.attend(q, k, v, cache)
    return named


def attention_of_rows(at: Place) -> Named:
    """New tokens of texts of unequal length, one each, before and after the first leaves its row to the last."""
    layer, named = _attention(4, 2, 64), {}
    rows = Rows(layer.config, 3, at.normal(1).device, at.dtype)
    with torch.inference_mode():
        for held in (*rows.keys, *rows.values):
            held.copy_(at.normal(*held.shape))
        rows.lengths, rows.length = [30, 7, 12], 30
        for count in (3, 2):
            q, k, v = (at.normal(count, heads, 1, 64) for heads in (4, 2, 2))
            named[f"{count} rows"] = layer.attend(q, k, v, rows)
            rows.advance(1)
            rows.leave(0)
    return named


def _attention(heads: int, kv_heads: int, width: int) -> Attention:
    return Attention(ModelConfig(n_embd=8, n_head=heads, n_kv_head=kv_heads, head_dim=width), 0).eval()


def root_mean_square_norm(at: Place, own: bool) -> Named:
    return _norms(at, lambda x, weight: rms_norm(x, weight, 1e-6, own), ("the weight",))


def layer_norm(at: Place) -> Named:
    return _norms(at, lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias), ("the weight", "the bias"))


def _norms(at: Place, norm: Callable[..., Tensor], weights: tuple[str, ...]) -> Named:
    """Over the whole width and, as for queries and keys, over the width of a head."""
    named: Named = {}
    for shape in ((2, 48, 1280), (2, 24, 4, 64)):
        inputs = {"x": at.normal(*shape), **{name: at.normal(shape[-1]) for name in weights}}
        named |= {f"{what} ({shape[-1]} wide)": values for what, values in both_modes(at, norm, **inputs).items()}
    return named


def rotary(at: Place) -> Named:
    angles = Rotary(ModelConfig(n_head=4, n_kv_head=4, head_dim=64, context=512)).to(at.device, at.dtype)(100, 400)
    return both_modes(at, lambda x: rotate(x, angles), x=at.normal(2, 400, 4, 64))


def swiglu(at: Place) -> Named:
    return both_modes(at, lambda gate, up: F.silu(gate) * up, gate=_wide(at), up=at.normal(4096))


def gelu(at: Place) -> Named:
    return both_modes(at, lambda x: F.gelu(x, approximate="tanh"), x=_wide(at))


def _wide(at: Place) -> Tensor:
    """Mostly small numbers; some are so large that a careless exp or tanh makes no number of them."""
    values = at.normal(4096).detach()
    values[:16] *= 100
    return values.requires_grad_()


def embedding(at: Place) -> Named:
    ids = at.ids(300, 4, 96)  # some rows many times, some never
    return both_modes(at, lambda weight: F.embedding(ids, weight), weight=at.normal(384, 64))


def cross_entropy(at: Place) -> Named:
    targets = at.ids(8192, 96)
    targets[::5] = -100

    def losses(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")

    return both_modes(at, losses, logits=at.normal(96, 8192, scale=3.0))


def chunked_cross_entropy(at: Place) -> Named:
    """As training uses it: the head's product and the loss by chunks, the last one shorter, and both gradients."""
    x, weight = at.normal(96, 64), at.normal(8192, 64, scale=0.1)
    targets = at.ids(8192, 96)
    targets[::5] = -100
    loss = chunked_loss(x, weight, targets, chunk_bytes=40 * 8192 * 4)
    return with_gradients(at, loss[None], x=x, weight=weight)


def clipping(at: Place) -> Named:
    gradients = [at.normal(*shape).detach() for shape in ((64, 96), (64,), (3, 5))]
    weights = [torch.zeros_like(gradient).requires_grad_() for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)  # changes the gradients in place
    return {"the norm": norm, **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}


def adamw(at: Place, fused: bool) -> Named:
    """Three steps on a matrix, a vector and a transposed matrix, whose memory is not in reading order."""
    weights = [nn.Parameter(at.normal(64, 96).detach()), nn.Parameter(at.normal(64).detach())]
    if not fused:
        weights.append(nn.Parameter(at.normal(32, 48).detach().T))
    group = {"params": weights, "weight_decay": 0.1}
    optimiser = AdamW([group], 0.1, beta1=0.9, beta2=0.95, eps=1e-8, fused=fused and not at.witness)
    for _ in range(3):
        for weight in weights:
            weight.grad = at.normal(*weight.shape).detach()
        optimiser.step()
    return {f"weight {i}": weight for i, weight in enumerate(weights)}


def addcdiv(at: Place) -> Named:
    """x + a / b in place, also on a transposed tensor: that wrote nothing once (pytorch#118115)."""
    with torch.no_grad():
        tensors = {"the whole tensor": at.normal(48, 32), "the transposed tensor": at.normal(32, 48).T}
        return {
            what: x.addcdiv_(at.normal(48, 32), 1.5 + at.normal(48, 32).square(), value=-0.5)
            for what, x in tensors.items()
        }


def lerp(at: Place) -> Named:
    """Between tensors in place, as in Muon's momentum (a batch of matrices and its views)."""
    with torch.no_grad():
        batch = at.normal(3, 32, 48)
        view = batch.unbind()[1].lerp_(at.normal(48, 32).T, 0.05).clone()
        return {"a view": view, "the batch": batch.lerp_(at.normal(3, 32, 48), 0.95)}


def averaging(at: Place) -> Named:
    """The weights' moving average, over weights of any number of axes."""
    with torch.no_grad():
        return {
            f"an average of {len(shape)} axes": at.normal(*shape).lerp_(at.normal(*shape), 0.01)
            for shape in ((96,), (96, 64))
        }


def newton_schulz(device: Device) -> Pairs:
    dtype = device.orthogonalising_dtype()

    def work(at: Place) -> Named:
        with torch.no_grad():
            stacks = {"wide": at.normal(3, 64, 128), "tall": at.normal(3, 128, 64), "square": at.normal(2, 64, 64)}
            return {
                f"a {shape} update": orthogonalise(stack, dtype=torch.float64 if at.witness else dtype)
                for shape, stack in stacks.items()
            }

    return against_cpu(work, device)


def muon(device: Device) -> Pairs:
    """Two steps, for the momentum, on two matrices of one shape, which are updated as one batch."""

    def work(at: Place) -> Named:
        weights = [nn.Parameter(at.normal(128, 64, scale=0.1).detach()) for _ in range(2)]
        gradients = [[at.normal(128, 64).detach() for _ in weights] for _ in range(2)]
        if at.witness:
            moved = [_muon_by_hand(weight, history) for weight, *history in zip(weights, *gradients, strict=True)]
            return {f"weight {i}": weight for i, weight in enumerate(moved)}
        dtype = device.orthogonalising_dtype()
        optimiser = Muon(weights, 0.5, momentum=0.9, weight_decay=0.1, beta2=0.8, dtype=dtype)
        for drawn in gradients:
            for weight, gradient in zip(weights, drawn, strict=True):
                weight.grad = gradient
            optimiser.step()
        return {f"weight {i}": weight for i, weight in enumerate(weights)}

    return against_cpu(work, device)


def _muon_by_hand(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    momentum, squares = torch.zeros_like(weight), torch.zeros_like(weight[:, :1])
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalise((0.1 * gradient + 0.9 * momentum)[None], dtype=weight.dtype)[0]
        squares = 0.8 * squares + 0.2 * update.square().mean(1, keepdim=True)
        evened = update / squares.sqrt()
        weight = weight * (1 - 0.5 * 0.1) - 0.5 * 2**0.5 * evened * (update.norm() / evened.norm())
    return weight.detach()


# --- features, each against the same device without it --------------------------------------------------------------

TINY = ModelConfig(n_layer=2, n_embd=96, n_head=2, n_kv_head=2, head_dim=64, n_ff=128, vocab_size=320, context=64)
GPT2 = TINY.model_copy(
    update={"norm": "layernorm", "position": "learned", "mlp": "gelu", "qk_norm": False, "bias": True}
)


def dropout(device: Device) -> Pairs:
    """Zero or scaled up, the right share of it, the same in the backward pass, and a function of the seed."""
    x = Place(device.torch_device, torch.float32).normal(256, 256)

    def dropped(seed: int) -> Tensor:
        device.seed(seed)
        return F.dropout(x, 0.25, training=True)

    result, again, other = dropped(1), dropped(1), dropped(2)
    kept = (result != 0).float()
    (gradient,) = torch.autograd.grad(result.sum(), x)
    return {
        "what is kept": (result, x * kept / 0.75),
        "the gradient": (gradient, kept / 0.75),
        "the same seed": (again, result),
        "another seed": truth((other != result).any()),
        "the share kept": truth((kept.mean() - 0.75).abs() < 0.02),
    }


def checkpointing(device: Device) -> Pairs:
    """A block with dropout, recomputed in the backward pass, against one that is not."""
    at = Place(device.torch_device, torch.float32)
    config = TINY.model_copy(update={"dropout": 0.25})
    block, x = at.module(Block(config, 0)).train(), at.normal(2, 32, config.n_embd)
    angles = Rotary(config).to(device.torch_device)(0, 32)

    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        device.seed(1)
        weights = [x, *block.parameters()]
        return [*torch.autograd.grad(call(block, x, angles, None).square().mean(), weights)]

    plain = gradients(lambda block, *inputs: block(*inputs))
    return dict(zip(_gradient_names(block), zip(gradients(device.checkpointed), plain, strict=True), strict=True))


def _gradient_names(block: nn.Module) -> list[str]:
    return [f"the gradient of {name}" for name in ("x", *dict(block.named_parameters()))]


def half(device: Device, dtype: torch.dtype) -> Pairs:
    """A decoder's loss, gradients and cached logits in 16 bits, against float32."""
    few, full = (_passes(replace(device, dtype=dtype)) for dtype in (dtype, torch.float32))
    return {what: (few[what], full[what]) for what in full}


def _passes(device: Device) -> Named:
    at = Place(device.torch_device, torch.float32)
    model = at.module(Decoder(TINY))
    ids = at.ids(TINY.vocab_size, 2, 48)
    with device.autocast():
        loss = model.losses(ids[:, :-1], ids[:, 1:]).mean()
    scaler = device.scaler()
    (scaler.scale(loss) if scaler else loss).backward()
    for optimiser in build(model, OptimConfig(), torch.float32) if scaler else []:
        scaler.unscale_(optimiser)  # type: ignore[union-attr, arg-type]
    return {"the loss": loss, **_gradients(model), "the logits": _cached_logits(model.eval(), device, ids[:1])}


def _gradients(model: nn.Module) -> Named:
    """Of all weights but the keys' bias, on which attention does not depend: its gradient is nothing but rounding."""
    return {
        f"the gradient of {name}": weight.grad
        for name, weight in model.named_parameters()
        if weight.grad is not None and not name.endswith("k_proj.bias")
    }


@torch.inference_mode()
def _cached_logits(model: Decoder, device: Device, ids: Tensor) -> Tensor:
    """Of a prompt, one token by the decoder and one by its short form, and more tokens at once."""
    cache = Cache(TINY, 1, device.torch_device, device.dtype)
    prompt, token, next_token, rest = ids.split([30, 1, 1, 16], dim=1)
    with device.autocast():
        logits = [model(prompt, cache), model(token, cache)]
        logits += [OneToken(model, cache)(next_token[:, 0])[:, None], model(rest, cache)]
    return torch.cat([part.float() for part in logits], dim=1)


def decoder(at: Place, config: ModelConfig, own_norm: bool) -> Named:
    """A whole model's loss and gradients: what the parts may not show, one after the other they may."""
    model = at.module(Decoder(config)).train()
    model.model.suit(0, own_norm, remake=False)
    ids = at.ids(config.vocab_size, 2, 49)
    loss = model.losses(ids[:, :-1], ids[:, 1:]).mean()
    loss.backward()
    return {"the loss": loss, **_gradients(model)}


# --- the list -------------------------------------------------------------------------------------------------------


def checks(device: Device) -> Iterator[Check]:
    """What is run, in order: the parts first. float16 is for GPUs only, as in the settings."""
    yield _on_cpu("float32 precision", "full_precision", product, limit=PRECISION, distance=absolute)
    yield _on_cpu("matmul", "always", products, (64, 1000, 4096, MATMUL_CAP), matmuls=True)
    for length in (32_766, 32_767, 32_768):
        yield _on_cpu(f"matmul, {length:,} long", "long_matmul", products, (length,), matmuls=True)
    yield _on_cpu("linear", "always", linear, (2, 48, 96), 160, False, matmuls=True)
    yield _on_cpu("linear with bias", "gpt2_shape", linear, (2, 48, 96), 160, True, matmuls=True)
    yield _on_cpu("linear, one row", "cached_decoding", linear, (1, 1, 96), 8192, False, matmuls=True)
    yield _on_cpu("linear, 50,304 rows", "long_matmul", linear, (64, 64), 50_304, False, matmuls=True)
    yield _on_cpu("linear, 32,768 tokens", "long_matmul", linear, (8, 4096, 64), 64, False, matmuls=True)
    yield _on_cpu("attention", "always", attention, 4, 4, matmuls=True)
    yield _on_cpu("attention, grouped", "grouped_queries", attention, 4, 2, matmuls=True, after={"always"})
    if device.query_block:
        yield _on_cpu("attention by blocks", "always", attention, 4, 2, 40, matmuls=True)
    yield _on_cpu("cached attention", "cached_decoding", cached_attention, 4, 4, matmuls=True)
    yield _on_cpu("cached attention, grouped", "cached_decoding", cached_attention, 4, 2, matmuls=True)
    parts: AbstractSet[Feature] = {"always", "cached_decoding"}
    yield _on_cpu("attention of rows", "cached_decoding", attention_of_rows, matmuls=True, after=parts)
    yield _on_cpu("rms_norm", "always", root_mean_square_norm, device.own_norm)
    yield _on_cpu("layer_norm", "gpt2_shape", layer_norm)
    yield _on_cpu("rotary positions", "always", rotary)
    yield _on_cpu("silu", "always", swiglu)
    yield _on_cpu("gelu", "gpt2_shape", gelu)
    yield _on_cpu("embedding", "always", embedding)
    yield _on_cpu("cross-entropy", "always", cross_entropy)
    yield _on_cpu("chunked cross-entropy", "chunked_loss", chunked_cross_entropy, matmuls=True, after={"always"})
    yield _on_cpu("gradient clipping", "always", clipping)
    yield _on_cpu("AdamW, fused", "fused_adamw", adamw, True)
    yield _on_cpu("addcdiv_", "unfused_adamw", addcdiv)
    yield _on_cpu("AdamW, not fused", "unfused_adamw", adamw, False, after={"unfused_adamw"})
    yield _on_cpu("lerp_", "muon", lerp)
    yield _on_cpu("moving average", "averaging", averaging)
    few = device.orthogonalising_dtype() != torch.float32
    yield Check("Newton-Schulz", "muon", newton_schulz, 2 * COARSE if few else ROUNDING, overall, not few)
    yield Check("Muon", "muon", muon, COARSE if few else ROUNDING, overall, not few, {"muon"})
    yield Check("dropout", "dropout", dropout, ROUNDING, largest)
    yield Check("checkpointing", "checkpointing", checkpointing, ROUNDING, largest, after={"dropout"})
    yield _on_cpu("whole model", "always", decoder, TINY, device.own_norm, matmuls=True, after={"always"})
    yield _on_cpu(
        "whole model, GPT-2", "gpt2_shape", decoder, GPT2, False, matmuls=True, after={"always", "gpt2_shape"}
    )
    yield _half("bfloat16")
    if not device.resident:
        yield _half("float16")


def _on_cpu(
    name: str,
    needed: Feature,
    work: Callable[..., Named],
    *settings: Any,
    limit: float = ROUNDING,
    distance: Distance = largest,
    matmuls: bool = False,
    after: AbstractSet[Feature] = frozenset(),
) -> Check:
    compare = partial(against_cpu, lambda at: work(at, *settings))
    return Check(name, needed, compare, limit, distance, matmuls, after)


def _half(name: Literal["bfloat16", "float16"]) -> Check:
    return Check(f"{name} autocast", name, partial(half, dtype=DTYPES[name]), COARSE, overall)
