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
from siliconlm.hardware.device import Device
from siliconlm.inference.sampler import sample
from siliconlm.model.decoder import Cache, Decoder


class Session:
    """A model with a cache: `feed` tokens, get the logits that follow them. The cache is allocated once."""

    def __init__(self, model: Decoder, device: Device) -> None:
        self.model = model
        self.device = device
        self.cache = Cache(model.config, 1, device.torch_device, device.dtype)
        self.ids: list[int] = []

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> Tensor:
        """Logits [V] after `ids`, float32 on the CPU.

        When the context is full the older half is forgotten and the newer half read again, so text can go on.
        """
        self.ids += ids
        if self.cache.length + len(ids) > self.model.config.context:
            ids = self.ids[-max(1, self.model.config.context // 2) :]
            self.cache.length = 0
        with self.device.autocast():
            hidden = self.model.model(torch.tensor([ids], device=self.device.torch_device), self.cache)
            logits_BV: Tensor = self.model.lm_head(hidden[:, -1])
        return logits_BV[0].float().cpu()


def generate(
    model: Decoder, tokenizer: Tokenizer, device: Device, prompt: str, settings: SampleConfig, seed: int, index: int = 0
) -> Iterator[Sampled]:
    """Continue a prompt; yields pieces of text and, last, the counts. An empty prompt starts a new document.

    Ends at the end-of-text token, a stop text (which is left out), or `max_tokens`.
    """
    start = time.perf_counter()
    session, stream, hold = Session(model, device), tokenizer.stream(), StopText(settings.stop)
    generator = torch.Generator().manual_seed((seed + index) % (1 << 63))
    banned = banned_ids(model, tokenizer)
    made, stopped_by = 0, "max_tokens"
    ids = tokenizer.encode(prompt) or [tokenizer.eos]
    while made < settings.max_tokens:
        logits = session.feed(ids).index_fill(0, banned, -torch.inf)
        token = sample(logits, torch.tensor(session.ids), settings, generator)
        made += 1
        if token == tokenizer.eos:
            stopped_by = "end of text"
            break
        if text := hold.push(stream.push(token)):
            yield Sampled(text, index)
        if hold.found:
            stopped_by = "stop text"
            break
        ids = [token]
    rest = "" if hold.found else hold.push(stream.flush()) + hold.flush()
    yield Sampled(rest, index, True, made, round(time.perf_counter() - start, 4), stopped_by)


def banned_ids(model: Decoder, tokenizer: Tokenizer) -> Tensor:
    """Ids that are no text: rows that pad the vocabulary, and special tokens but the end of text."""
    special = [token for token in tokenizer.special_ids if token != tokenizer.eos]
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
