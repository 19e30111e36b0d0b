"""A conversation with a model: a history that fits the context, and answers as they are made."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch

from siliconlm.config import SampleConfig
from siliconlm.data.chat import Conversation, Message, Template
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Sampled
from siliconlm.hardware.device import Device
from siliconlm.inference.session import Continuation, Session, banned_ids
from siliconlm.model.decoder import Decoder

ROOM = 4  # an answer gets at least this part of the context


def fitted(template: Template, messages: Conversation, context: int, room: int) -> tuple[Conversation, int]:
    """The messages whose prompt leaves `room` tokens of the context, and how many were dropped.

    The oldest turns go first, a question with its answer; a system message stays. SiliconError where the last message
    does not fit even so.
    """
    head = messages[:1] if messages and messages[0].role == "system" else ()
    turns = messages[len(head) :]

    def last(pairs: int) -> Conversation:
        """The last message, and so many questions with their answers before it."""
        return (*head, *turns[max(0, len(turns) - 1 - 2 * pairs) :])

    def is_too_long(pairs: int) -> bool:
        return len(template.prompt(last(pairs))) + room > context

    if is_too_long(0):
        what = f"the message is too long: {len(template.prompt(last(0))):,} tokens with what surrounds it"
        fix = f"The model's context is {context:,} tokens, of which {room:,} are kept for the answer."
        raise SiliconError(what, fix=fix, kind="bad_data")
    # A history may be much longer than the context: what is tried grows with what fits, not with what there is.
    most, reach = len(turns) // 2, 1
    while reach <= most and not is_too_long(reach):
        reach *= 2
    fits = bisect_left(range(min(reach, most + 1)), True, lo=reach // 2 + 1, key=is_too_long) - 1
    return last(fits), len(messages) - len(last(fits))


@dataclass(slots=True)
class Talk:
    """A model and what was said. `messages` may be changed between answers."""

    model: Decoder
    template: Template
    device: Device
    settings: SampleConfig
    seed: int
    messages: list[Message] = field(default_factory=list)
    told: bool = False  # that the beginning was dropped

    def ask(self, text: str) -> Generator[Event, None, None]:
        """Say something; yields the answer in pieces, after a Notice where the beginning had to be dropped.

        Both are in `messages` once the answer has begun, as far as it came; a message that does not fit is not.
        """
        asked = (*self.messages, Message("user", text))
        context = self.model.config.context
        room = max(1, min(self.settings.max_tokens, context // ROOM))
        kept, dropped = fitted(self.template, asked, context, room)
        if dropped and not self.told:
            self.told = True
            yield Notice("the conversation is longer than the model's context: its oldest turns are forgotten")
        self.messages = [*asked, Message("assistant", "")]
        try:
            for piece in self._answer(self.template.prompt(kept), context):
                self.messages[-1] = Message("assistant", self.messages[-1].content + piece.text)
                yield piece
        finally:
            if not self.messages[-1].content.strip():
                del self.messages[-2:]  # nothing was said: an empty turn would be out of order

    def _answer(self, prompt: list[int], context: int) -> Iterator[Sampled]:
        tokenizer, ends = self.template.tokenizer, self.template.ends
        settings = self.settings.model_copy(
            update={"max_tokens": min(self.settings.max_tokens, context - len(prompt)), "num_samples": 1}
        )
        turn = sum(message.role == "assistant" for message in self.messages)
        text = Continuation(tokenizer, settings, self.seed, turn, time.perf_counter(), ends)
        text.index = 0
        session, ids = Session(self.model, self.device), prompt
        banned_V = torch.zeros(self.model.config.vocab_size)
        banned_V[banned_ids(self.model, tokenizer, ends)] = -torch.inf
        while not text.stopped_by:
            token, ready = text.take(session.feed([ids])[0] + banned_V, session.ids[0])
            ids = [token]
            if ready:
                yield ready
