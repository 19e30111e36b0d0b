"""Generation: prefill the cache, decode token by token, stream text that is always whole characters."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from siliconlm.config import SampleConfig
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Sampled
from siliconlm.hardware.device import FEW_BYTES, Device
from siliconlm.inference.decode import can_fold, one_token
from siliconlm.inference.sampler import sample
from siliconlm.model.decoder import Cache, Decoder

TOGETHER = 16  # texts drawn at once


class Reader:
    """A model with a cache: reads new token ids for every row, and says the logits that follow them.

    Logits are [B, V], float32 on the CPU.
    """

    def __init__(self, model: Decoder, device: Device, cache: Cache) -> None:
        self.model = model
        self.device = device
        self.cache = cache
        self.size = sum(weight.nbytes for weight in model.parameters())
        few = self.size < FEW_BYTES
        self.one_token = one_token(model, cache, few) if can_fold(model.config, self.size) else None

    @torch.inference_mode()
    def read(self, ids: list[list[int]]) -> Tensor:
        """The logits after as many new ids for each row."""
        if len(ids[0]) > 1:
            return self.prefill(ids, self.cache)
        with self.device.autocast(), self.device.few_threads(self.size):
            if self.one_token is None:
                return self.prefill(ids, self.cache)
            return self.one_token(torch.tensor(ids, device=self.device.torch_device)[:, 0]).float().cpu()

    @torch.inference_mode()
    def prefill(self, ids: list[list[int]], cache: Cache) -> Tensor:
        """The same by the whole decoder, into any cache."""
        ids_BT = torch.tensor(ids, device=self.device.torch_device)
        with self.device.autocast():
            return self.model.lm_head(self.model.model(ids_BT, cache)[:, -1]).float().cpu()


class Session(Reader):
    """A model with a cache for sequences of equal length: `feed` tokens, get the logits that follow them."""

    def __init__(self, model: Decoder, device: Device, batch: int = 1) -> None:
        super().__init__(model, device, Cache(model.config, batch, device.torch_device, device.dtype))
        self.ids: list[list[int]] = [[] for _ in range(batch)]

    def feed(self, ids: list[list[int]]) -> Tensor:
        """Logits [B, V] after as many new ids for each sequence, float32 on the CPU.

        When the context is full the older half is forgotten and the newer half read again, so text can go on.
        """
        for sequence, new in zip(self.ids, ids, strict=True):
            sequence += new
        if self.cache.length + len(ids[0]) > self.model.config.context:
            ids = [sequence[-max(1, self.model.config.context // 2) :] for sequence in self.ids]
            self.cache.length = 0
        return self.read(ids)


class Continuation:
    """One text in the making: draws its tokens with a generator of its own and says which text is ready."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: SampleConfig,
        seed: int,
        index: int,
        start: float,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.settings, self.ends, self.index = settings, ends | {tokenizer.eos}, index
        self.stream, self.hold = tokenizer.stream(), StopText(settings.stop)
        self.generator = torch.Generator().manual_seed((seed + index) % (1 << 63))
        self.start = start
        self.made = 0
        self.stopped_by = ""

    def take(self, logits_V: Tensor, seen: list[int]) -> tuple[int, Sampled | None]:
        """The next token, and the text that it makes ready; the last one's has the counts."""
        token = sample(logits_V, seen, self.settings, self.generator)
        self.made += 1
        text = "" if token in self.ends else self.hold.push(self.stream.push(token))
        if token in self.ends:
            self.stopped_by = "end of text"
        elif self.hold.found:
            self.stopped_by = "stop text"
        elif self.made == self.settings.max_tokens:
            self.stopped_by = "max_tokens"
        if self.stopped_by:
            rest = "" if self.hold.found else self.hold.push(self.stream.flush()) + self.hold.flush()
            seconds = round(time.perf_counter() - self.start, 4)
            return token, Sampled(text + rest, self.index, True, self.made, seconds, self.stopped_by)
        return token, Sampled(text, self.index) if text else None


def generate(
    model: Decoder, tokenizer: Tokenizer, device: Device, prompt: str, settings: SampleConfig, seed: int
) -> Iterator[Sampled]:
    """Continue a prompt `num_samples` times, some of them at once; yields pieces of each text and, last, its counts.

    An empty prompt starts a new document. A text ends at the end-of-text token, a stop text (which is left out), or
    `max_tokens`. Number `index` is drawn with the seed `seed + index`.
    """
    start = time.perf_counter()
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos]
    banned_V = torch.zeros(model.config.vocab_size).index_fill(0, banned_ids(model, tokenizer), -torch.inf)
    for first in range(0, settings.num_samples, TOGETHER):
        numbers = range(first, min(first + TOGETHER, settings.num_samples))
        texts = [Continuation(tokenizer, settings, seed, index, start) for index in numbers]
        session, ids = Session(model, device, len(texts)), [prompt_ids for _ in texts]
        while not all(text.stopped_by for text in texts):
            logits_BV = session.feed(ids) + banned_V
            ids = [[tokenizer.eos] for _ in texts]  # what a text that has ended is fed, beside the others
            for row, text in enumerate(texts):
                if text.stopped_by:
                    continue
                token, ready = text.take(logits_BV[row], session.ids[row])
                ids[row] = [token]
                if ready:
                    yield ready


def banned_ids(model: Decoder, tokenizer: Tokenizer, ends: frozenset[int] = frozenset()) -> Tensor:
    """Ids that are no text: rows that pad the vocabulary, and special tokens but those that end it."""
    special = [token for token in tokenizer.special_ids if token != tokenizer.eos and token not in ends]
    return torch.tensor([*special, *range(tokenizer.size, model.config.vocab_size)], dtype=torch.long)


def check_prompt(tokenizer: Tokenizer, prompt: str) -> None:
    """SiliconError naming the characters of a prompt that the tokenizer cannot write."""
    missing = tokenizer.missing(prompt)
    if missing:
        listed = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in missing[:8])
        raise SiliconError(
            f"the model's tokenizer has no {listed}",
            where="prompt",
            fix="Leave these characters out, or train with --tokenizer byte, which knows all text.",
        )


class StopText:
    """Passes text through, holding back what may become a stop text; `found` once one has come."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        self.held += text
        places = [place for place in (self.held.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.found = True
            return self.held[: min(places)]
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready

    def flush(self) -> str:
        """What was held back and did not become a stop text."""
        rest, self.held = ("" if self.found else self.held), ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    sizes = range(1, min(len(text), len(stop)) + 1)
    return max((size for size in sizes if text.endswith(stop[:size])), default=0)
