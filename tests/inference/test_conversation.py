"""What of a conversation the model sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siliconlm.data.chat import TEMPLATES, Conversation, Message, Template
from siliconlm.data.tokenizer import byte_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.inference.conversation import fitted

CHATML = Template(TEMPLATES["chatml"], byte_tokenizer())
LENGTHS = st.lists(st.integers(1, 40), max_size=12)


class Counted(Template):
    """A template that counts the messages it has written."""

    written = 0

    def prompt(self, messages: Conversation) -> list[int]:
        Counted.written += len(messages)
        return super().prompt(messages)


def talk(lengths: list[int], system: bool) -> Conversation:
    """Questions and answers of so many letters, a question of 5 last."""
    turns = [text for length in lengths for text in ("q" * length, "a" * length)]
    roles = ("user", "assistant") * (len(lengths) + 1)
    said = [Message(role, text) for role, text in zip(roles, [*turns, "q" * 5], strict=False)]
    return (Message("system", "Be kind."), *said) if system else tuple(said)


@given(LENGTHS, st.booleans(), st.integers(60, 700), st.integers(1, 60))
def test_as_many_of_the_latest_turns_as_fit(lengths: list[int], system: bool, context: int, room: int) -> None:
    """Against trying every number of turns, from all of them on."""
    messages = talk(lengths, system)
    head, turns = messages[:system], messages[system:]
    ways = ((*head, *turns[dropped:]) for dropped in range(0, len(turns), 2))
    expected = next((way for way in ways if len(CHATML.prompt(way)) + room <= context), None)
    if expected is None:
        with pytest.raises(SiliconError, match="the message is too long"):
            fitted(CHATML, messages, context, room)
    else:
        assert fitted(CHATML, messages, context, room) == (expected, len(messages) - len(expected))


def test_a_history_of_any_length_costs_what_the_context_holds() -> None:
    counted = Counted(TEMPLATES["chatml"], byte_tokenizer())
    Counted.written = 0
    kept, dropped = fitted(counted, talk([3] * 5000, system=True), 600, 100)
    assert dropped + len(kept) == 10_002 and len(kept) > 10
    assert Counted.written < 20 * len(kept)
