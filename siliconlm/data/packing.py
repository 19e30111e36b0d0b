"""Whole documents in rows of one length: each row takes those that fill it best, and the rest of it is padding.

Which documents share a row is decided once for a dataset, by best fit in decreasing length (Ding et al. 2024, arXiv
2404.10830); an epoch is a permutation of the rows. So a batch stays a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from siliconlm.config import DataConfig
from siliconlm.data.batches import IGNORED, Batch, Batches, Stream, evaluation_windows, permuted
from siliconlm.data.dataset import Dataset
from siliconlm.data.shards import Shard, Tokens
from siliconlm.errors import SiliconError

SCANNED = 1 << 24  # tokens looked through at once


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Documents of a shard, each of which begins with `separator`, packed into rows of `context` tokens.

    A text's document keeps its separator and learns the next one's, so that it learns to end; one longer than a row
    is cut into several. With a `mask` (a conversation's) only marked tokens are learned, the separator is left out,
    and what does not fit a row is cut off. `apart`: documents of a row do not see each other.
    """

    shard: Shard
    context: int
    seed: int
    separator: int
    mask: Shard | None
    apart: bool
    starts: Tokens  # of each piece, in the order of rows
    lengths: Tokens
    rows: Tokens  # where each row's pieces begin, and the end
    cut: int  # conversations that lost their end

    @classmethod
    def of(
        cls, shard: Shard, context: int, seed: int, separator: int, mask: Shard | None = None, apart: bool = True
    ) -> Packed:
        starts, lengths, cut = _pieces(shard, separator, context, mask is not None)
        order, rows = best_fit(lengths, context)
        if not len(rows) - 1:
            raise SiliconError("no document in it", where=str(shard.path), kind="bad_data")
        return cls(shard, context, seed, separator, mask, apart, starts[order], lengths[order], rows, cut)

    @property
    def windows(self) -> int:
        """Rows in an epoch."""
        return len(self.rows) - 1

    def take(self, cursor: int, n: int) -> Batch:
        """Rows number `cursor` to `cursor + n` of the stream."""
        chosen: list[int] = []
        while len(chosen) < n:
            epoch, first = divmod(cursor + len(chosen), self.windows)
            last = min(self.windows, first + n - len(chosen))
            order = permuted(np.arange(first, last, dtype=np.uint64), self.windows, self.seed, epoch)
            chosen += [int(row) for row in order]
        return self._batch(chosen, n)

    def evaluation(self, batch: int, limit: int | None = None) -> Iterator[Batch]:
        """All rows in order, or `limit` of them spread evenly, in batches of one shape."""
        total = self.windows
        chosen = [
            (2 * index + 1) * total // (2 * min(limit or total, total)) for index in range(min(limit or total, total))
        ]
        size = min(batch, len(chosen))
        for first in range(0, len(chosen), size):
            yield self._batch(chosen[first : first + size], size)

    def _batch(self, rows: list[int], n: int) -> Batch:
        """These rows, and empty ones up to `n`."""
        inputs = np.zeros((n, self.context), dtype=np.int64)
        targets = np.full((n, self.context), IGNORED, dtype=np.int64)
        documents = np.full((n, self.context), -1, dtype=np.int64)
        for at, row in enumerate(rows):
            place = 0
            for number in range(int(self.rows[row]), int(self.rows[row + 1])):
                start, length = int(self.starts[number]), int(self.lengths[number])
                span = slice(place, place + length)
                inputs[at, span], targets[at, span] = self._piece(start, length)
                documents[at, span] = number - int(self.rows[row])
                place += length
        return Batch(inputs, targets, documents if self.apart else None)

    def _piece(self, start: int, length: int) -> tuple[Tokens, Tokens]:
        """Inputs and targets of a piece. At the shard's end the next document's separator is made up."""
        tokens = self.shard.read(start, min(length + 1, self.shard.count - start))
        if len(tokens) == length:
            tokens = np.append(tokens, self.separator)
        targets = tokens[1:].copy()
        if self.mask:
            learned = self.mask.read(start, min(length + 1, self.mask.count - start))
            targets[np.append(learned, 0)[1 : length + 1] == 0] = IGNORED
        return tokens[:-1], targets


def _pieces(shard: Shard, separator: int, context: int, masked: bool) -> tuple[Tokens, Tokens, int]:
    """Start and length of every piece, and how many documents lost their end."""
    found = [_separators(shard, first, separator) for first in range(0, shard.count, SCANNED)]
    begins = np.concatenate([np.array([0]), *found]) if found else np.array([0])
    begins = np.unique(begins)
    ends = np.append(begins[1:], shard.count)
    if masked:
        starts, lengths = begins + 1, ends - begins - 1
        kept = lengths > 1
        starts, lengths = starts[kept], lengths[kept]
        return starts, np.minimum(lengths, context), int((lengths > context).sum())
    counts = -(-(ends - begins) // context)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + number * context
    return starts, np.minimum(context, np.repeat(ends, counts) - starts), 0


def _separators(shard: Shard, first: int, separator: int) -> Tokens:
    return np.flatnonzero(shard.read(first, min(SCANNED, shard.count - first)) == separator) + first


def best_fit(lengths: np.ndarray[Any, Any], capacity: int) -> tuple[Tokens, Tokens]:
    """Pieces into rows of `capacity`, the longest first, each into the fullest row that still holds it.

    Returns the pieces' numbers in the order of rows, and where each row begins among them (and the end). The rows with
    a given room are a stack; which rooms there are is the bits of one number, so a piece takes constant time.
    """
    order = np.argsort(-lengths, kind="stable")
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, rows = 0, np.empty(len(lengths), dtype=np.int64)
    count = 0
    for number in order.tolist():
        length = int(lengths[number])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row, count = capacity, count, count + 1
        rows[number] = row
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    by_row = np.argsort(rows, kind="stable")
    return by_row, np.searchsorted(rows[by_row], np.arange(count + 1))


# --- what a run trains on and is measured by -------------------------------------------------------------------------


class Validation(Protocol):
    """The validation split in batches of one shape; every evaluation of a run sees the same ones."""

    @property
    def windows(self) -> int: ...

    def evaluation(self, batch: int, limit: int | None = None) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True)
class Windows:
    """A text's validation split in non-overlapping windows of the context."""

    shard: Shard
    context: int
    separator: int | None

    @property
    def windows(self) -> int:
        return -(-(self.shard.count - 1) // self.context)

    def evaluation(self, batch: int, limit: int | None = None) -> Iterator[Batch]:
        return evaluation_windows(self.shard, self.context, batch, limit, self.separator)


def training_stream(dataset: Dataset, context: int, data: DataConfig, seed: int) -> Stream:
    """The training split as a run's settings want it. Conversations are always packed whole."""
    eos = dataset.tokenizer.eos
    if dataset.is_chat:
        return Packed.of(dataset.train, context, seed, eos, dataset.masks["train"], data.document_mask)
    if data.packing == "best_fit":
        return Packed.of(dataset.train, context, seed, eos, None, data.document_mask)
    return Batches(dataset.train, context, seed, eos if data.document_mask else None)


def validation(dataset: Dataset, context: int, data: DataConfig) -> Validation:
    """The validation split, by windows whatever a text's training rows are packed by."""
    eos = dataset.tokenizer.eos
    if dataset.is_chat:
        return Packed.of(dataset.val, context, 0, eos, dataset.masks["val"], data.document_mask)
    return Windows(dataset.val, context, eos if data.document_mask else None)
