"""Conversations: read from every common form into one, checked, and laid out as tokens by a template.

A template is Jinja, as in a Hugging Face folder; the named ones here are too. What the template writes and what people
wrote are kept apart: a special token's name in a message stays text, so no message can forge a turn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from siliconlm.data.jinja import render
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.errors import SiliconError, nearest

ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OASST = {"prompter": "user", "assistant": "assistant"}
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "nanochat": (
        "{{ '<|bos|>' }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|user_start|>' + (messages[0]['content'] + '\n\n' if loop.index0 == 1 and messages[0]['role'] == 'system'"
        " else '') + message['content'] + '<|user_end|>' }}{% elif message['role'] == 'assistant' %}"
        "{{ '<|assistant_start|>' + message['content'] + '<|assistant_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # that no text holds (Unicode 3.1, D14)


class Message(NamedTuple):
    role: str
    content: str


Conversation = tuple[Message, ...]


# --- reading ---------------------------------------------------------------------------------------------------------


def conversation(record: Any, place: str) -> Conversation:
    """The conversation in a record of any known form: OpenAI `messages`, ShareGPT `conversations`, Alpaca
    `instruction` and `output`, `prompt` and `completion`, a bare array of {role, content}, or an OASST tree.

    SiliconError naming `place` (file and line) where it is none of these, empty, or has its roles out of order.
    """
    messages = tuple(_messages(record, place))
    _check(messages, place)
    return messages


def _messages(record: Any, place: str) -> Iterator[Message]:
    if isinstance(record, list):
        yield from (_message(item, "role", "content", place) for item in record)
    elif not isinstance(record, dict):
        _bad(f"a conversation cannot be {_kind(record)}", place)
    elif "messages" in record:
        yield from _messages(_list(record["messages"], "messages", place), place)
    elif "conversations" in record:
        for item in _list(record["conversations"], "conversations", place):
            names = ("from", "value") if isinstance(item, dict) and "from" in item else ("role", "content")
            yield _message(item, *names, place, SHAREGPT)
    elif "instruction" in record:
        rest = record.get("input") or ""
        request = _text(record["instruction"], "instruction", place)
        yield Message("user", request + (f"\n\n{_text(rest, 'input', place)}" if rest else ""))
        yield Message("assistant", _text(record.get("output"), "output", place))
    elif isinstance(record.get("prompt"), dict):
        yield from _best_path(record["prompt"], place)
    elif "prompt" in record:
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            part = record.get(name)
            yield from _messages(part, place) if isinstance(part, list) else [Message(role, _text(part, name, place))]
    else:
        _bad(f"no conversation in it, only {', '.join(map(repr, list(record)[:6])) or 'nothing'}", place)


def _message(item: Any, role: str, content: str, place: str, roles: dict[str, str] | None = None) -> Message:
    if not isinstance(item, dict):
        _bad(f"a message cannot be {_kind(item)}", place)
    for name in (role, content):
        if name not in item:
            _bad(f"a message has no {name!r}, only {', '.join(map(repr, list(item)[:6])) or 'nothing'}", place)
    known = roles or {name: name for name in ROLES}
    if not isinstance(item[role], str) or item[role] not in known:
        close = nearest(str(item[role]), known)
        _bad(f"role {item[role]!r} is not one of {', '.join(known)}", place, close)
    return Message(known[item[role]], _text(item[content], content, place))


def _best_path(node: Any, place: str) -> Iterator[Message]:
    """An OASST tree from its root by the best-ranked replies."""
    while node:
        yield _message(node, "role", "text", place, OASST)
        replies = _list(node.get("replies") or [], "replies", place)
        ranked = [reply for reply in replies if isinstance(reply, dict)]
        node = min(ranked, key=lambda reply: _rank(reply, ranked), default=None)


def _rank(reply: dict[str, Any], replies: list[dict[str, Any]]) -> tuple[float, int]:
    rank = reply.get("rank")
    return (rank if isinstance(rank, int | float) else float("inf"), replies.index(reply))


def _text(value: Any, name: str, place: str) -> str:
    """A string, or OpenAI's list of parts where all are text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text"), f"{name}.text", place) for part in value)
    if value is None:
        _bad(f"it has no {name!r}", place)
    _bad(f"{name!r} is {_kind(value)}, not text", place)


def _list(value: Any, name: str, place: str) -> list[Any]:
    if not isinstance(value, list):
        _bad(f"{name!r} is {_kind(value)}, not a list", place)
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _check(messages: Conversation, place: str) -> None:
    """System at most once and first; then user and assistant in turn."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        _bad("the conversation is empty", place)
    for number, (message, wanted) in enumerate(zip(turns, ("user", "assistant") * len(turns), strict=False), 1):
        if message.role != wanted:
            what = f"message {number + len(messages) - len(turns)} is the {message.role}'s where the {wanted}'s belongs"
            _bad(
                f"roles out of order: {what}",
                place,
                "A system message may come first; then user and assistant in turn.",
            )
        if not message.content.strip():
            _bad(f"message {number + len(messages) - len(turns)}, the {message.role}'s, is empty", place)


def _bad(what: str, place: str, fix: str = "") -> NoReturn:
    raise SiliconError(what, where=place, fix=fix or "Mend the record, or leave it out.", kind="bad_data")


# --- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Template:
    """How a conversation becomes tokens: Jinja `source`, and the tokenizer whose special tokens it writes.

    `name` is for errors. SiliconError when the template is not sound, or writes special tokens as plain text.
    """

    source: str
    tokenizer: Tokenizer
    name: str = "chat template"

    def prompt(self, messages: Conversation) -> list[int]:
        """The tokens up to where the assistant's next answer begins."""
        return self._ids(*self._rendered(messages, True))

    def encode(self, messages: Conversation) -> tuple[list[int], list[bool]]:
        """The tokens, and which are to be learned: the assistants' answers, each with the token that ends it."""
        whole, mark = self._rendered(messages, False)
        ids: list[int] = []
        learned: list[bool] = []
        done = 0
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start, end = self._answer(messages[: number + 1], whole, mark)
            for text, learns in ((whole[done:start], False), (whole[start:end], True)):
                new = self._ids(text, mark)
                ids += new
                learned += [learns] * len(new)
            done = end
        rest = self._ids(whole[done:], mark)
        return ids + rest, learned + [False] * len(rest)

    def shown(self, messages: Conversation) -> list[tuple[str, bool]]:
        """The text of the tokens in pieces, and whether each piece is learned."""
        ids, learned = self.encode(messages)
        pieces = []
        for learns, group in itertools.groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
            pieces.append(("".join(self._named([id for id, _ in group])), learns))
        return pieces

    def _named(self, ids: list[int]) -> Iterator[str]:
        """Special tokens by name, what is between them as text."""
        special = self.tokenizer.special_ids
        for is_special, group in itertools.groupby(ids, key=lambda id: id in special):
            part = list(group)
            yield "".join(map(self.tokenizer.name_of, part)) if is_special else self.tokenizer.decode(part)

    def _answer(self, messages: Conversation, whole: str, mark: str) -> tuple[int, int]:
        """Where the last message of a beginning stands in the text of the whole, end token included."""
        before, _ = self._rendered(messages[:-1], True, mark)
        after, _ = self._rendered(messages, False, mark)
        if not (after.startswith(before) and whole.startswith(after)):
            what = "the template rewrites earlier turns, so that what is learned cannot be told apart"
            raise SiliconError(what, where=self.name, fix="Choose another --template: chatml.", kind="bad_data")
        ends = [found.end() for found in self._special.finditer(after, len(before))]
        return len(before), ends[-1] if ends else len(after)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end an answer: what the template writes after one, and the end of text."""
        ids, learned = self.encode((Message("user", "a"), Message("assistant", "b")))
        answer = [id for id, learns in zip(ids, learned, strict=True) if learns]
        return frozenset({self.tokenizer.eos, *(id for id in answer[-1:] if id in self.tokenizer.special_ids)})

    def _rendered(self, messages: Conversation, prompt: bool, mark: str | None = None) -> tuple[str, str]:
        """The template's text, and the character that stands inside special tokens' names which people wrote."""
        if mark is None:
            text = "".join(message.content for message in messages)
            mark = next(char for char in NONCHARACTERS if char not in text)
        said = [
            {"role": role, "content": self._special.sub(lambda m: _cut(m[0], mark), text)} for role, text in messages
        ]
        names = {"bos_token": self._bos, "eos_token": self.tokenizer.name_of(self.tokenizer.eos)}
        return render(self.source, self.name, messages=said, add_generation_prompt=prompt, **names), mark

    def _ids(self, text: str, mark: str) -> list[int]:
        """Special tokens by name, all between them as plain text."""
        ids, done = [], 0
        for found in self._special.finditer(text):
            ids += self._plain(text[done : found.start()], mark)
            ids.append(self.tokenizer.special_names[found[0]])
            done = found.end()
        return ids + self._plain(text[done:], mark)

    def _plain(self, text: str, mark: str) -> list[int]:
        return self.tokenizer.encode(text.replace(mark, "")) if text else []

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Any special token's name, the longest first."""
        names = sorted(self.tokenizer.special_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    @property
    def _bos(self) -> str:
        names = [name for name in ("<|begin_of_text|>", "<s>", "<|bos|>") if name in self.tokenizer.special_names]
        return names[0] if names else self.tokenizer.name_of(self.tokenizer.eos)


def _cut(name: str, mark: str) -> str:
    return name[:1] + mark + name[1:]


def open_template(tokenizer: Tokenizer, word: str | None = None, own: str | None = None) -> Template:
    """The template by name or file, a model's `own`, or the first named one whose tokens the tokenizer has."""
    if word is None and own is not None:
        return Template(own, tokenizer, "the model's own template")
    if word is None:
        fitting = [name for name in TEMPLATES if not _missing(name, tokenizer)]
        if not fitting:
            fix = "Give a --template FILE (Jinja), or prepare the base's text with a tokenizer of ours."
            raise SiliconError("the tokenizer has no tokens for turns of a chat", where=tokenizer.kind, fix=fix)
        word = fitting[0]
    if word in TEMPLATES:
        if missing := _missing(word, tokenizer):
            what = f"template {word} needs {', '.join(missing)}, which the tokenizer does not have"
            raise SiliconError(what, where=tokenizer.kind, fix="Choose another --template.")
        return Template(TEMPLATES[word], tokenizer, f"template {word}")
    path = Path(word).expanduser()
    if not path.is_file():
        fix = nearest(word, TEMPLATES) or f"Type one of {', '.join(TEMPLATES)}, or a file of Jinja."
        raise SiliconError("no such template", where=word, fix=fix, kind="missing_input")
    return Template(path.read_text(encoding="utf-8"), tokenizer, str(path))


def _missing(name: str, tokenizer: Tokenizer) -> list[str]:
    """The special tokens of a named template that a tokenizer lacks."""
    return sorted({token for token in re.findall(r"<\|\w+\|>", TEMPLATES[name])} - tokenizer.special_names.keys())
