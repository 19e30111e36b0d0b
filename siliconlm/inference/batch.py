"""Generations of unequal length that share one forward pass a token; one joins or leaves between any two tokens."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from siliconlm.config import ModelConfig, SampleConfig
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.events import Sampled
from siliconlm.hardware.device import Device
from siliconlm.inference.session import Continuation, Reader, banned_ids
from siliconlm.model.decoder import Cache, Decoder, Rows


class Row:
    """A text in the making, and its tokens so far, the prompt's first.

    It ends at the end-of-text token, one of `ends`, a stop text, `max_tokens`, or the end of the context, which must be
    longer than the prompt. Number `index` is drawn with the seed `seed + index`.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        prompt: list[int],
        settings: SampleConfig,
        seed: int,
        index: int = 0,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        room = model.config.context - len(prompt)
        assert prompt and room > 0
        settings = settings.model_copy(update={"max_tokens": min(settings.max_tokens, room)})
        self.ids = list(prompt)
        self.text = Continuation(tokenizer, settings, seed, index, time.perf_counter(), ends)
        banned = banned_ids(model, tokenizer, ends)
        self.banned_V = torch.zeros(model.config.vocab_size).index_fill(0, banned, -torch.inf)

    @property
    def ended(self) -> bool:
        return bool(self.text.stopped_by)

    def take(self, logits_V: Tensor) -> Sampled | None:
        """Draw the next token; the text that it makes ready."""
        token, ready = self.text.take(logits_V + self.banned_V, self.ids)
        self.ids.append(token)
        return ready


class BatchGenerator:
    """A model and up to `size` rows of text. Memory for all of them is taken at once."""

    def __init__(self, model: Decoder, device: Device, size: int) -> None:
        config, place, dtype = model.config, device.torch_device, device.dtype
        self.model, self.size = model, size
        self.cache, self.newcomer = Rows(config, size, place, dtype), Cache(config, 1, place, dtype)
        self.reader = Reader(model, device, self.cache)
        self.rows: list[Row] = []

    def join(self, row: Row) -> Sampled | None:
        """Read a new row's prompt and make its first token; the text that is ready."""
        assert len(self.rows) < self.size
        self.newcomer.length = 0
        ready = row.take(self.reader.prefill([row.ids], self.newcomer)[0])
        if not row.ended:
            self.cache.join(self.newcomer)
            self.rows.append(row)
        return ready

    def step(self) -> list[tuple[Row, Sampled]]:
        """A token more for every row; the texts that are ready. Rows that end leave."""
        logits_BV = self.reader.read([row.ids[-1:] for row in self.rows])
        rows = list(self.rows)
        taken = [(row, row.take(logits_V)) for row, logits_V in zip(rows, logits_BV, strict=True)]
        for row in rows:
            if row.ended:
                self.leave(row)
        return [(row, ready) for row, ready in taken if ready]

    def leave(self, row: Row) -> None:
        """Give up a row, whose place the last one takes."""
        place = self.rows.index(row)
        self.cache.leave(place)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last

    def clear(self) -> None:
        """Give up all rows."""
        self.cache.clear()
        self.rows.clear()


def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a row of a cache takes."""
    return 2 * config.n_layer * config.n_kv_head * config.context * config.head_dim * dtype.itemsize
