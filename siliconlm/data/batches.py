"""A batch is a pure function of (seed, step): nothing about the order is stored but one integer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from siliconlm.data.shards import Shard, Tokens
from siliconlm.errors import SiliconError

IGNORED = -100  # the target that losses pass over
WORD = (1 << 64) - 1
ROUNDS = 6
Words = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences to train on, int64 [N, T] each: `inputs`, the `targets` that follow them (-100 where there is nothing
    to learn), and which document of its row each input stands in; without `documents` all that came before is seen."""

    inputs: Tokens
    targets: Tokens
    documents: Tokens | None = None

    @classmethod
    def of(cls, sequences: Tokens, apart: bool = False) -> Batch:
        """Each token of [N, T + 1] learns the one that follows. `apart`: with a document for each row."""
        inputs = sequences[:, :-1]
        return cls(inputs, sequences[:, 1:], np.zeros_like(inputs) if apart else None)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def learned(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    def rows(self, start: int, end: int) -> Batch:
        documents = None if self.documents is None else self.documents[start:end]
        return Batch(self.inputs[start:end], self.targets[start:end], documents)


class Stream(Protocol):
    """An endless stream of sequences, a pure function of where its cursor stands; `windows` make an epoch."""

    @property
    def windows(self) -> int: ...

    def take(self, cursor: int, n: int) -> Batch: ...


@dataclass(frozen=True, slots=True)
class Batches:
    """An endless stream of sequences from one shard: each epoch visits every window once, in an order of its own.

    A window is `context` inputs and the shifted target. Its borders move from epoch to epoch; what they leave over at
    both ends of the shard is less than two windows.
    """

    shard: Shard
    context: int
    seed: int
    separator: int | None = None  # the token that begins a document, where documents are not to see each other

    def __post_init__(self) -> None:
        if self.shard.count < self.context + 1:
            raise _too_long(self.context, self.shard)

    @property
    def windows(self) -> int:
        """Sequences in an epoch."""
        return max(1, (self.shard.count - self.context) // self.context)

    def take(self, cursor: int, n: int) -> Batch:
        """Sequences number `cursor` to `cursor + n` of the stream."""
        sequences = np.empty((n, self.context + 1), dtype=np.int64)
        for row, start in enumerate(self._starts(cursor, n)):
            sequences[row] = self.shard.read(start, self.context + 1)
        inputs = sequences[:, :-1]
        documents = None if self.separator is None else documents_of(inputs, self.separator)
        return Batch(inputs, sequences[:, 1:], documents)

    def _starts(self, cursor: int, n: int) -> Iterator[int]:
        """The first token of each sequence."""
        end = cursor + n
        while cursor < end:
            epoch, first = divmod(cursor, self.windows)
            last = min(self.windows, first + end - cursor)
            order = permuted(np.arange(first, last, dtype=np.uint64), self.windows, self.seed, epoch)
            offset = self._offset(epoch)
            yield from (offset + int(window) * self.context for window in order)
            cursor += last - first

    def _offset(self, epoch: int) -> int:
        """Where the first window of an epoch begins."""
        spare = self.shard.count - 1 - self.windows * self.context
        return _key(self.seed, epoch, ROUNDS) % (spare + 1)


def documents_of(inputs: Tokens, separator: int) -> Tokens:
    """The number of each token's document in its row, [N, T], where documents begin with `separator`."""
    return (inputs == separator).cumsum(axis=1)


def _too_long(context: int, shard: Shard) -> SiliconError:
    longest = shard.count - 1
    fits = 1 << (longest.bit_length() - 1) if longest >= 2 else 0  # the presets' steps divide by powers of two
    what = f"context {context} is longer than the training data ({shard.count} tokens)"
    fix = f"Type --set model.context={fits}, or give more text." if fits else "Give more text."
    return SiliconError(what, where=str(shard.path), fix=fix)


# --- the order -------------------------------------------------------------------------------------------------------


def permuted(index: Words, n: int, seed: int, epoch: int) -> Words:
    """Where each `index` below `n` goes in the permutation of 0..n-1 that belongs to (seed, epoch).

    A Feistel network over the next even power of two; what lands outside walks on until it is inside (cycle walking,
    Black and Rogaway 2002). It needs no table, so the memory does not grow with n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [_key(seed, epoch, number) for number in range(ROUNDS)]
    out = _feistel(index, half, keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], half, keys)
        outside = outside[out[outside] >= n]
    return out


def _feistel(values: Words, half: int, keys: list[int]) -> Words:
    """One pass over numbers of 2 * half bits: a bijection whatever the round function."""
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ np.uint64(key)) & mask)
    return left << np.uint64(half) | right


def _mixed(values: Words) -> Words:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


@lru_cache(maxsize=64)  # those of an epoch are asked for at every step
def _key(*numbers: int) -> int:
    """One 64-bit word that depends on all the numbers and their order."""
    state = 0
    for number in numbers:
        word = np.array([(state + number + 0x9E3779B97F4A7C15) & WORD], dtype=np.uint64)
        state = int(_mixed(word)[0])
    return state


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluation_windows(
    shard: Shard, context: int, batch: int, limit: int | None = None, separator: int | None = None
) -> Iterator[Batch]:
    """Batches of `context` tokens a row that score every token but the first exactly once.

    All batches have the same shape, of at most `batch` rows: places past the end hold input 0 and target -100, which
    losses pass over. `limit` takes that many windows, spread evenly over the shard.
    """
    total = -(-(shard.count - 1) // context)
    chosen = total if limit is None else min(limit, total)
    numbers = [(2 * index + 1) * total // (2 * chosen) for index in range(chosen)]
    rows = min(batch, chosen)
    for first in range(0, chosen, rows or 1):
        inputs = np.zeros((rows, context), dtype=np.int64)
        targets = np.full((rows, context), IGNORED, dtype=np.int64)
        for row, number in enumerate(numbers[first : first + rows]):
            tokens = shard.read(number * context, min(context + 1, shard.count - number * context))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        yield Batch(inputs, targets, None if separator is None else documents_of(inputs, separator))
