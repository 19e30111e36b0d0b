"""One decoder by features: Qwen3 (default), Llama and GPT-2 shapes.

Read top down: cache, decoder, block, attention, MLP, norms, rotary positions.

Letters at the end of a name give a tensor's shape: B sequences, T new tokens, S tokens attended to, C width
(`n_embd`), H query heads, K key/value heads, D head width, V vocabulary.

Parameters are named as the Hugging Face files name them (Qwen3/Llama), so reading and writing weights is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliconlm.config import ModelConfig
from siliconlm.model.attention import block_attention, same_document
from siliconlm.model.loss import chunk_rows, chunked_loss, matmul_dtype
from siliconlm.model.ops import remade, rms_norm, rotate, swiglu

Checkpoint = Callable[..., Any]
EMBEDDING = 0.02  # standard deviation of fresh embeddings and heads
REMADE_WIDTH = 256  # of narrower models operators are as dear as their arithmetic


class Cache:
    """Keys and values of tokens already seen, allocated once: per layer two tensors [B, K, context, D].

    `length` is the number of tokens held. The decoder advances it after all layers have written.
    """

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, size: int = 0
    ) -> None:
        shape = (batch, config.n_kv_head, size or config.context, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0

    @property
    def start(self) -> int | Tensor:
        """The place of the first new token."""
        return self.length

    def extend(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values; returns all of them, [B, K, S, D]."""
        end = self.length + k_BKTD.size(2)
        self.keys[layer][:, :, self.length : end] = k_BKTD
        self.values[layer][:, :, self.length : end] = v_BKTD
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def mask(self, new: int) -> Tensor | None:
        """Which of the keys that `extend` returned each new token sees; None: all but those that come later."""
        return causal_mask(new, self.length, self.keys[0].device) if new > 1 and self.length else None

    def advance(self, new: int) -> None:
        self.length += new


class Rows(Cache):
    """A cache whose rows differ in length, of which the first are in use: one new token for each at a time.

    `lengths` are those of the rows in use; `length` is the longest.
    """

    def __init__(self, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, rows, device, dtype)
        self.lengths: list[int] = []

    def join(self, cache: Cache) -> None:
        """Take the only row of another cache into the next free one."""
        for held, other in zip((*self.keys, *self.values), (*cache.keys, *cache.values), strict=True):
            held[len(self.lengths), :, : cache.length] = other[0, :, : cache.length]
        self._set([*self.lengths, cache.length])

    def leave(self, row: int) -> None:
        """Give a row up; the last one takes its place."""
        *others, last = self.lengths
        if row < len(others):
            for held in (*self.keys, *self.values):
                held[row, :, :last] = held[len(others), :, :last]
            others[row] = last
        self._set(others)

    def clear(self) -> None:
        """Give all rows up."""
        self._set([])

    @property
    def start(self) -> int | Tensor:
        """One place for all rows, or each its own: [B, 1]."""
        if len(set(self.lengths)) == 1:
            return self.length
        return torch.tensor(self.lengths, device=self.keys[0].device)[:, None]

    def extend(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        start, rows, end = self.start, len(self.lengths), self.length + 1
        for held, new in ((self.keys[layer], k_BKTD), (self.values[layer], v_BKTD)):
            if isinstance(start, int):
                held[:rows, :, start:end] = new
            else:
                held[torch.arange(rows, device=held.device), :, start[:, 0]] = new[:, :, 0].to(held.dtype)
        return self.keys[layer][:rows, :, :end], self.values[layer][:rows, :, :end]

    def mask(self, new: int) -> Tensor | None:
        """[B, 1, 1, S]: a shorter row does not see what stands behind its end."""
        assert new == 1
        if isinstance(self.start, int):
            return None
        return (torch.arange(self.length + 1, device=self.keys[0].device) <= self.start)[:, None, None]

    def advance(self, new: int) -> None:
        self._set([length + new for length in self.lengths])

    def _set(self, lengths: list[int]) -> None:
        self.lengths, self.length = lengths, max(lengths, default=0)


class Decoder(nn.Module):
    """Token ids [B, T] -> logits [B, T, V]. With a cache, the ids are those that follow the cached ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        return self.lm_head(self.model(ids_BT, cache))

    def losses(self, ids_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Cross-entropy of each target in nats, float32 [B, T]; 0 where the target is -100.

        Without gradients it never holds more logits than a chunk's (see loss.py).
        """
        x_NC = self.model(ids_BT, documents_BT=documents_BT).flatten(0, 1)
        targets_N = targets_BT.flatten()
        rows = len(x_NC) if torch.is_grad_enabled() else chunk_rows(self.config.vocab_size)
        parts = [
            F.cross_entropy(self.lm_head(x_RC).float(), targets_R, ignore_index=-100, reduction="none")
            for x_RC, targets_R in zip(x_NC.split(rows), targets_N.split(rows), strict=True)
        ]
        return torch.cat(parts).view_as(targets_BT)

    def loss(
        self, ids_BT: Tensor, targets_BT: Tensor, chunked: bool = False, documents_BT: Tensor | None = None
    ) -> Tensor:
        """The sum of `losses`. `chunked`: by chunks with gradients too, which changes only rounding."""
        if not chunked or not torch.is_grad_enabled():
            return self.losses(ids_BT, targets_BT, documents_BT).sum()
        x_BTC = self.model(ids_BT, documents_BT=documents_BT)
        return chunked_loss(x_BTC.flatten(0, 1), self.lm_head.weight, targets_BT.flatten())

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal weights drawn on the CPU, so that a seed gives the same model on every device.

        Matrices: standard deviation 1/sqrt(fan-in); those that write to the residual stream start at zero, so each
        block begins as the identity (muP-like; "Fixup", Zhang et al. 2019). Embedding: 0.02 where it is also the head.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                values = torch.zeros(weight.shape)
            elif weight.dim() < 2:
                values = torch.ones(weight.shape)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                values = torch.zeros(weight.shape)
            else:
                small = "embed" in name or name == "lm_head.weight"
                deviation = EMBEDDING if small else weight.size(1) ** -0.5
                values = torch.randn(weight.shape, generator=generator) * deviation
            weight.copy_(values)

    def count_parameters(self) -> int:
        """Trained numbers, shared weights counted once."""
        return sum(weight.numel() for weight in self.parameters())


@lru_cache(maxsize=64)
def count_parameters(config: ModelConfig) -> int:
    """Trained numbers of a shape, without making it."""
    with torch.device("meta"):
        return Decoder(config).count_parameters()


def fresh_loss(config: ModelConfig) -> float:
    """About what fresh weights lose on random tokens, in nats per token.

    Every block is the identity then, so the head sees the normalised embedding. A tied one answers each token with
    that token, the surer the wider the model; otherwise logits are small and the loss is that of chance.
    """
    noise = math.log(config.vocab_size) + EMBEDDING**2 * config.n_embd / 2
    if not config.tied:
        return noise
    itself = EMBEDDING * config.n_embd / (math.sqrt(2) if config.position == "learned" else 1)
    return float(np.logaddexp(noise, itself))


class Trunk(nn.Module):
    """Everything below the output head: [B, T] -> [B, T, C]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.n_embd)
        self.embed_positions = Embedding(config.context, config.n_embd) if config.position == "learned" else None
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.rotary = Rotary(config) if config.position == "rope" else None
        self.checkpoint: Checkpoint | None = None  # set by training: recomputes each block in the backward pass

    def suit(self, query_block: int, own_norm: bool, remake: bool) -> None:
        """Take the operators that suit a device in training: attention by blocks of so many queries where there is no
        cache (0 takes torch's); an RMSNorm of our own; and what is cheap made again in the backward pass. A narrow
        model has little to save by the last."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.query_block = query_block
            elif isinstance(module, RMSNorm):
                module.own = own_norm
            elif isinstance(module, Block | SwiGLU | GeluMLP):
                module.remake = remake and self.config.n_embd >= REMADE_WIDTH

    def forward(self, ids_BT: Tensor, cache: Cache | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """`documents_BT`: numbers of documents that are not to see each other, where a row holds several."""
        start = cache.start if cache else 0
        x_BTC = self.embed_tokens(ids_BT)
        if self.embed_positions is not None:
            x_BTC = x_BTC + self.embed_positions(positions(start, ids_BT, documents_BT))
        x_BTC = F.dropout(x_BTC, self.config.dropout, self.training)
        angles = self.rotary(start, ids_BT.size(1)) if self.rotary is not None else None
        for block in self.layers:
            if self.checkpoint is not None and self.training:
                x_BTC = self.checkpoint(block, x_BTC, angles, None, documents_BT)
            else:
                x_BTC = block(x_BTC, angles, cache, documents_BT)
        if cache:
            cache.advance(ids_BT.size(1))
        return self.norm(x_BTC)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.n_embd)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = make_norm(config, config.n_embd)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GeluMLP(config)
        self.remake = False  # see Trunk.suit

    def forward(
        self,
        x_BTC: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        x_BTC = x_BTC + self._normed(self.input_layernorm, x_BTC, self.self_attn, angles, cache, documents_BT)
        return x_BTC + self._normed(self.post_attention_layernorm, x_BTC, self.mlp)

    def _normed(self, norm: nn.Module, x_BTC: Tensor, part: nn.Module, *inputs: Any) -> Tensor:
        """part(norm(x)). Autocast would convert the norm's result anew for each matmul."""
        dtype = matmul_dtype(x_BTC)
        return applied(part, lambda: norm(x_BTC).to(dtype), self.remake, *inputs)


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023), optional QK-norm and rotary positions."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.query_block = 0  # see Trunk.suit
        queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, queries, bias=config.bias)
        self.k_proj = Linear(config.n_embd, keys, bias=config.bias)
        self.v_proj = Linear(config.n_embd, keys, bias=config.bias)
        self.o_proj = Linear(queries, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        x_BTC: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        batch, new, _ = x_BTC.shape
        q_BTHD = self.q_proj(x_BTC).view(batch, new, -1, self.config.head_dim)
        k_BTKD = self.k_proj(x_BTC).view(batch, new, -1, self.config.head_dim)
        v_BTKD = self.v_proj(x_BTC).view(batch, new, -1, self.config.head_dim)
        if self.config.qk_norm:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if angles is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, angles), rotate(k_BTKD, angles)
        q_BHTD, k_BKTD, v_BKTD = (part.transpose(1, 2) for part in (q_BTHD, k_BTKD, v_BTKD))
        y_BHTD = self.attend(q_BHTD, k_BKTD, v_BKTD, cache, documents_BT)
        y_BTC = self.o_proj(y_BHTD.transpose(1, 2).reshape(batch, new, -1))
        return F.dropout(y_BTC, self.config.dropout, self.training)

    def attend(
        self,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        cache: Cache | None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        new, mask = q_BHTD.size(2), None
        if cache:
            k_BKTD, v_BKTD = cache.extend(self.index, k_BKTD, v_BKTD)
            mask = cache.mask(new)
        elif self.query_block:
            return block_attention(q_BHTD, k_BKTD, v_BKTD, self.query_block, documents_BT)
        elif documents_BT is not None:
            mask = causal_mask(new, 0, q_BHTD.device) & same_document(documents_BT, documents_BT)[:, None]
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BKTD,
            v_BKTD,
            attn_mask=mask,
            is_causal=mask is None and new > 1,
            enable_gqa=self.config.n_kv_head != self.config.n_head,
        )


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.remake = False  # see Trunk.suit
        self.gate_proj = Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.up_proj = Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.down_proj = Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        gate, up = self.gate_proj(x_BTC), self.up_proj(x_BTC)
        make = (lambda: swiglu(gate, up)) if self.remake else (lambda: F.silu(gate) * up)
        return F.dropout(applied(self.down_proj, make, self.remake), self.dropout, self.training)


class GeluMLP(nn.Module):
    """GPT-2's MLP: down(gelu(up(x))) with the tanh approximation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.remake = False  # see Trunk.suit
        self.up_proj = Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.down_proj = Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        up = self.up_proj(x_BTC)
        hidden = applied(self.down_proj, lambda: F.gelu(up, approximate="tanh"), self.remake)
        return F.dropout(hidden, self.dropout, self.training)


def applied(part: nn.Module, make: Callable[[], Tensor], remake: bool, *inputs: Any) -> Tensor:
    """part(make()). `remake`: what was made is not kept for the backward pass, but made again."""
    made = make()
    with remade(made, make) if remake and torch.is_grad_enabled() else nullcontext():
        return part(made, *inputs)


class Linear(nn.Linear):
    """nn.Linear. Made for its shape alone it draws no weights: that would load torch's compiler, for 1.5 s."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, likewise."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """`rms_norm` and its weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.own = False  # see Trunk.suit

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.own)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps)


class Rotary(nn.Module):
    """Angles of the rotary positions, for `rotate`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # NumPy's arrays are real where a model is made for its shape alone too: no compiler is loaded, as in Linear.
        even, places = (torch.from_numpy(np.arange(*ends)) for ends in ((0, config.head_dim, 2), (config.context,)))
        frequencies = config.rope_theta ** -(even / config.head_dim)
        angles_TD = torch.outer(places, frequencies)
        cos, sin, place = angles_TD.cos().repeat(1, 2), angles_TD.sin(), torch.get_default_device()
        sin = torch.cat((-sin, sin), 1)
        self.register_buffer("cos", cos.to(place), persistent=False)
        self.register_buffer("sin", sin.to(place), persistent=False)

    def forward(self, start: int | Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions start..start+new-1, each [T, 1, D]; the first half of the sines negative.

        For one new token a row whose `start` is its own, [B, 1, 1, D].
        """
        places = slice(start, start + new) if isinstance(start, int) else start
        return self.cos[places, None], self.sin[places, None]  # type: ignore[index]


def positions(start: int | Tensor, ids_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    """Learned positions count from where a document begins in its row: [T], or [B, T]. (Rotary ones are relative.)"""
    place_T = start + torch.arange(ids_BT.size(1), device=ids_BT.device)
    if documents_BT is None:
        return place_T
    begins_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
    return place_T - (place_T * begins_BT).cummax(dim=1).values


def causal_mask(new: int, past: int, device: torch.device) -> Tensor:
    """True where attention is allowed: query i (after `past` cached tokens) sees keys 0..past+i. [T, S]"""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(diagonal=past)
