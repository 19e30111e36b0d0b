"""The decoder for one new token a sequence, in few operators: weights are folded together once, beforehand.

At a million parameters starting an operator takes longer than its arithmetic. So a norm's weight goes into the matrix
that follows, projections that read the same input are one, and QK-norm's weights go into the rotary tables. The
numbers are the decoder's but for rounding.

On a CPU NumPy takes the place of torch, whose operators take longer to start: 1.6 times the tokens/s at 0.8 M
parameters (docs/experiments.md).

Letters as in decoder.py; N is all heads that are rotated (queries and keys), P the outputs of a joined matmul.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siliconlm.config import ModelConfig
from siliconlm.hardware.device import calm_blas
from siliconlm.model.decoder import Attention, Block, Cache, Decoder, SwiGLU

Array = np.ndarray[Any, np.dtype[np.float32]]
LARGEST = 1 << 30  # bytes of weights; beyond, starting operators is nothing, and the copies are much


def can_fold(config: ModelConfig, size: int) -> bool:
    """Whether a model of `size` bytes is small enough to gain, and has Qwen3's or Llama's features."""
    features = config.norm == "rmsnorm" and config.position == "rope" and config.mlp == "swiglu" and not config.bias
    return features and size <= LARGEST


class Folded(NamedTuple):
    """A block's weights, joined: tensors, or arrays."""

    qkv_PC: Any
    cos_TND: Any
    sin_TND: Any
    o_CP: Any
    gate_up_PC: Any
    down_CF: Any
    keys: Any  # the cache's, [B, K, context, D]
    values: Any


class Spot(NamedTuple):
    """Where the new tokens go, as indices into a cache, and what they see."""

    rows: Any
    place: Any  # one for all rows, or an array of each one's
    end: int
    seen: Any  # [B, 1, 1, S]; None: all before `end`


def one_token(model: Decoder, cache: Cache, few: bool) -> OneToken:
    """The step for where the cache is. NumPy has float32 alone, and is for models of `few` bytes."""
    keys = cache.keys[0]
    if not few or keys.dtype != torch.float32 or not keys.is_cpu:
        return OneToken(model, cache)
    calm_blas()
    return OnHost(model, cache)


class OneToken:
    """Token ids [B] -> logits [B, V] that follow them; writes to and reads from a decoder's cache."""

    @torch.no_grad()
    def __init__(self, model: Decoder, cache: Cache) -> None:
        config, dtype = model.config, cache.keys[0].dtype
        self.config, self.cache = config, cache
        self.embedding_VC = model.model.embed_tokens.weight
        self.head_VC = (model.lm_head.weight * _scale(model.model.norm.weight)).to(dtype)  # type: ignore[arg-type]
        self.floor_C, self.floor_D = (
            torch.tensor(math.sqrt(config.norm_eps * width), device=self.head_VC.device)
            for width in (config.n_embd, config.head_dim)
        )
        assert model.model.rotary is not None
        rotary = model.model.rotary(0, config.context)
        self.blocks = [
            _fold(block, rotary, keys, values)  # type: ignore[arg-type]  # ModuleList is not generic
            for block, keys, values in zip(model.model.layers, cache.keys, cache.values, strict=True)
        ]

    def __call__(self, ids_B: Tensor) -> Tensor:
        """To be called under inference mode, and the device's autocast."""
        config, batch, (rows, place, end, seen) = self.config, ids_B.size(0), self.spot(ids_B.size(0))
        queries, rotated = config.n_head, config.n_head + config.n_kv_head
        x_BC = self.embedding_VC[ids_B]
        for block in self.blocks:
            heads_BHD = F.linear(self.normed(x_BC), block.qkv_PC).view(batch, -1, config.head_dim)
            qk_BND = heads_BHD[:, :rotated]
            if config.qk_norm:
                qk_BND = qk_BND / torch.hypot(_length(qk_BND), self.floor_D)
            turned_BND = qk_BND.roll(config.head_dim // 2, -1)
            qk_BND = torch.addcmul(qk_BND * block.cos_TND[place], turned_BND, block.sin_TND[place])
            block.keys[rows, :, place] = qk_BND[:, queries:].to(block.keys.dtype)
            block.values[rows, :, place] = heads_BHD[:, rotated:].to(block.values.dtype)
            keys, values = (held[:batch, :, :end].flatten(0, 1) for held in (block.keys, block.values))
            q = qk_BND[:, :queries].reshape(len(keys), -1, config.head_dim)
            scores = torch.bmm(q, keys.mT)
            if seen is not None:
                scores = scores.view(batch, config.n_kv_head, -1, end).masked_fill(~seen, -torch.inf).view_as(scores)
            y = torch.bmm(torch.softmax(scores, -1), values)
            x_BC = x_BC + F.linear(y.view(batch, -1), block.o_CP)
            gate_BF, up_BF = F.linear(self.normed(x_BC), block.gate_up_PC).chunk(2, dim=-1)
            x_BC = x_BC + F.linear(F.silu(gate_BF) * up_BF, block.down_CF)
        self.cache.advance(1)
        return F.linear(self.normed(x_BC), self.head_VC)

    def spot(self, batch: int) -> Spot:
        start = self.cache.start
        seen, end = self.cache.mask(1), self.cache.length + 1
        if isinstance(start, int):
            return Spot(slice(batch), start, end, seen)
        return Spot(torch.arange(batch, device=start.device), start[:, 0], end, seen)

    def normed(self, x_BC: Tensor) -> Tensor:
        """x / sqrt(sum of squares + width * epsilon): RMSNorm but for the factors that are in the next matrix."""
        return x_BC / torch.hypot(_length(x_BC), self.floor_C)


class OnHost(OneToken):
    """The same in NumPy, on views of the weights and of the cache."""

    @torch.no_grad()
    def __init__(self, model: Decoder, cache: Cache) -> None:
        super().__init__(model, cache)
        self.floors = float(self.floor_C.square()), float(self.floor_D.square())
        self.embedding, self.head = self.embedding_VC.detach().numpy(), self.head_VC.numpy()
        self.arrays = [Folded(*(part.detach().numpy() for part in block)) for block in self.blocks]

    def __call__(self, ids_B: Tensor) -> Tensor:
        config, batch, (rows, place, end, seen) = self.config, ids_B.size(0), self.spot(ids_B.size(0))
        queries, rotated, half = config.n_head, config.n_head + config.n_kv_head, config.head_dim // 2
        x_BC = self.embedding[ids_B.numpy()]
        for block in self.arrays:
            heads_BND = (_unit(x_BC, self.floors[0]) @ block.qkv_PC.T).reshape(batch, -1, config.head_dim)
            qk_BND = heads_BND[:, :rotated]
            if config.qk_norm:
                qk_BND = _unit(qk_BND, self.floors[1])
            turned_BND = np.concatenate((qk_BND[..., half:], qk_BND[..., :half]), axis=-1)
            qk_BND = qk_BND * block.cos_TND[place] + turned_BND * block.sin_TND[place]
            block.keys[rows, :, place] = qk_BND[:, queries:]
            block.values[rows, :, place] = heads_BND[:, rotated:]
            q = qk_BND[:, :queries].reshape(batch, config.n_kv_head, -1, config.head_dim)
            scores = q @ block.keys[:batch, :, :end].transpose(0, 1, 3, 2)
            if seen is not None:
                scores = np.where(seen, scores, -np.inf)
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            y = (chances / chances.sum(-1, keepdims=True)) @ block.values[:batch, :, :end]
            x_BC = x_BC + y.reshape(batch, -1) @ block.o_CP.T
            both_BP = _unit(x_BC, self.floors[0]) @ block.gate_up_PC.T
            gate_BF, up_BF = both_BP[:, : config.n_ff], both_BP[:, config.n_ff :]
            # exp overflows beyond 88, where silu is 0 all the same.
            x_BC = x_BC + (gate_BF * up_BF / (1 + np.exp(-np.maximum(gate_BF, -80)))) @ block.down_CF.T
        self.cache.advance(1)
        return torch.from_numpy(_unit(x_BC, self.floors[0]) @ self.head.T)

    def spot(self, batch: int) -> Spot:
        rows, place, end, seen = super().spot(batch)
        if isinstance(rows, Tensor):
            rows, place, seen = rows.numpy(), place.numpy(), seen.numpy()
        return Spot(rows, place, end, seen)


def _unit(x: Array, floor: float) -> Array:
    """x / sqrt(sum of squares + floor) over the last axis."""
    return x / np.sqrt(np.vecdot(x, x) + floor)[..., None]


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _scale(weight: Tensor) -> Tensor:
    return weight * math.sqrt(len(weight))


def _fold(block: Block, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> Folded:
    attention, mlp, dtype = block.self_attn, block.mlp, keys.dtype
    assert isinstance(attention, Attention) and isinstance(mlp, SwiGLU)
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    cos_TND, sin_TND = _tables(attention, rotary)
    return Folded(
        (qkv * _scale(block.input_layernorm.weight)).to(dtype),  # type: ignore[arg-type]
        cos_TND,
        sin_TND,
        attention.o_proj.weight.to(dtype),
        (gate_up * _scale(block.post_attention_layernorm.weight)).to(dtype),  # type: ignore[arg-type]
        mlp.down_proj.weight.to(dtype),
        keys,
        values,
    )


def _tables(attention: Attention, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines times QK-norm's weights and, for queries, attention's 1 / sqrt(D).

    The half that rotation moves takes its weight with it, so turning is a roll.
    """
    config, (cos_T1D, sin_T1D) = attention.config, rotary
    counts = (config.n_head, config.n_kv_head)
    one = torch.ones(config.head_dim, device=cos_T1D.device)
    scales = [_scale(attention.q_norm.weight), _scale(attention.k_norm.weight)] if config.qk_norm else [one, one]
    scales[0] = scales[0] / math.sqrt(config.head_dim)
    weight_ND = torch.cat([scale.expand(count, -1) for scale, count in zip(scales, counts, strict=True)])
    half = config.head_dim // 2
    return cos_T1D * weight_ND, sin_T1D * weight_ND.roll(half, -1)
