"""The likeliest answers to many prompts: what a model is marked by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from siliconlm.data.tokenizer import Tokenizer
from siliconlm.hardware.device import Device
from siliconlm.inference.session import Session, banned_ids
from siliconlm.model.decoder import Decoder

TOGETHER = 64
LONGEST = 200  # tokens of an answer


def answers(
    model: Decoder, tokenizer: Tokenizer, device: Device, prompts: list[list[int]], ends: frozenset[int]
) -> Iterator[tuple[int, str]]:
    """Number of the prompt and text of the answer, the likeliest token each time, up to one that `ends` it.

    Prompts of one length are read together, so they come back in another order.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    for numbers in by_length.values():
        for first in range(0, len(numbers), TOGETHER):
            part = numbers[first : first + TOGETHER]
            ids = _together(model, tokenizer, device, [prompts[number] for number in part], ends)
            yield from zip(part, map(tokenizer.decode, ids), strict=True)


def _together(
    model: Decoder, tokenizer: Tokenizer, device: Device, prompts: list[list[int]], ends: frozenset[int]
) -> list[list[int]]:
    session, banned = Session(model, device, len(prompts)), banned_ids(model, tokenizer, ends)
    made: list[list[int]] = [[] for _ in prompts]
    going, new = set(range(len(prompts))), prompts
    for _ in range(min(LONGEST, model.config.context - len(prompts[0]))):
        best = session.feed(new).index_fill(1, banned, float("-inf")).argmax(-1).tolist()
        going -= {row for row in going if best[row] in ends}
        for row in going:
            made[row].append(best[row])
        if not going:
            break
        new = [[token] for token in best]
    return made
