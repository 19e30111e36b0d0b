"""From conversations to a dataset: tokens, which of them are learned, the template, and held-out questions.

Two passes in bounded memory: one checks and hashes, one encodes. Every so many-th conversation is for validation, so
that both splits hold all kinds.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from siliconlm import __version__
from siliconlm.data import tasks
from siliconlm.data.chat import Conversation, Message, Template, conversation
from siliconlm.data.dataset import FORMAT, Dataset, alone, check_arguments, data_folder, reused
from siliconlm.data.records import RECORD_SUFFIXES, looks_like_chat, read_records
from siliconlm.data.shards import ShardWriter, dtype_for
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Prepared, Shown, Working
from siliconlm.files import staged_folder, sweep, write_file

BUILTIN_CHAT = "chat"
REPORTED = 3  # conversations with nothing to learn that are named
QUESTIONS = 500  # held out, at most, of each task
MOST_LOST = 0.01  # of the text: a tokenizer that loses more cannot write these conversations
TOLD = 256  # conversations between two reports of progress


@dataclass(slots=True)
class _Split:
    """One split while it is written."""

    tokens: ShardWriter
    mask: ShardWriter
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, messages: Conversation, ids: list[int], learned: list[bool], template: Template) -> None:
        eos, special = template.tokenizer.eos, template.tokenizer.special_ids
        self.tokens.write(np.array([eos, *ids], dtype=np.uint32))
        self.mask.write(np.array([False, *learned], dtype=np.uint8))
        answers = [message.content for message in messages if message.role == "assistant"]
        text = sum(learns and id not in special for id, learns in zip(ids, learned, strict=True))
        self.counts.update(documents=1, learned=sum(learned), learned_text=text)
        self.counts.update(characters=sum(map(len, answers)), bytes=sum(len(answer.encode()) for answer in answers))

    def card(self) -> dict[str, Any]:
        facts = {"tokens": self.tokens.count, "sha256": self.tokens.sha256, "mask_sha256": self.mask.sha256}
        return {**dict.fromkeys(("documents", "characters", "bytes"), 0), **self.counts, **facts}


def prepare_chat(
    sources: list[str],
    name: str,
    template: Template,
    val_fraction: float = 0.1,
    force: bool = False,
    marked: bool = False,
) -> Iterator[Event]:
    """Make the chat dataset `name` out of files of conversations, or of the built-in set (`chat`).

    Only answers are learned. A conversation without one is left out and told; where none has one it is an error. A
    dataset that was made from the same conversations in the same way is used again. `marked`: the name gets a mark of
    what it is made from, so that another is never in the way.
    """
    check_arguments(name, val_fraction)
    recipe: dict[str, Any] = {"files": [(yield from _digest(sources, template))], "template": template.source}
    recipe |= {"tokenizer": template.tokenizer.sha256, "val_fraction": val_fraction}
    if marked:
        name = f"{name[:60]}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]}"
    target = data_folder() / name
    if target.exists() and not force:
        yield reused(target, recipe)
        return
    with alone(target):
        sweep(target.parent, name)
        with staged_folder(target, replace=force) as stage:
            card = yield from _write(stage, name, sources, template, recipe)
    yield Prepared(name, str(target), card)


def _conversations(sources: list[str]) -> Iterator[tuple[str, str, Conversation]]:
    """Place, task (of the built-in set) and messages of each conversation."""
    for word in sources:
        if word == BUILTIN_CHAT:
            yield from ((f"built-in {task}", task, messages) for task, messages in tasks.conversations(tasks.QUESTIONS))
            continue
        for path in record_files(Path(word).expanduser()):
            for place, record in read_records(path):
                yield place, "", conversation(record, place)


def hold_conversations(sources: list[str]) -> bool:
    """Whether these are conversations, by the first record of the first file that has records."""
    if BUILTIN_CHAT in sources and not Path(BUILTIN_CHAT).exists():
        return True
    paths = [Path(word).expanduser() for word in sources]
    files = [file for path in paths if path.exists() for file in _files(path)]
    return any(looks_like_chat(record) for file in files[:1] for _, record in islice(read_records(file), 1))


def show(sources: list[str], template: Template, count: int = 3) -> Iterator[Event]:
    """The first conversations as a model reads them, with what is learned of them."""
    for place, _, messages in islice(_conversations(sources), count):
        yield Shown(place, template.shown(messages))


def _files(path: Path) -> list[Path]:
    """The files of records at a path, sorted."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.suffix.lower() in RECORD_SUFFIXES and file.is_file()]


def record_files(path: Path) -> list[Path]:
    """A file of records, or those of a folder, sorted."""
    found = _files(path)
    if not found:
        kinds = ", ".join(f"*{suffix}" for suffix in RECORD_SUFFIXES)
        fix = f"Give {kinds}, a folder of them, or {BUILTIN_CHAT} for the built-in set."
        raise SiliconError("no conversations there", where=str(path), fix=fix, kind="missing_input")
    return found


def _digest(sources: list[str], template: Template) -> Generator[Event, None, str]:
    """One hash of all conversations; whatever is wrong with one is found before anything is written."""
    digest, answers = hashlib.sha256(), 0
    characters: Counter[str] = Counter()
    nothing: list[str] = []
    for number, (place, _, messages) in enumerate(_conversations(sources), 1):
        digest.update(json.dumps(messages).encode() + b"\n")
        for message in messages:
            characters.update(message.content)
        if messages[-1].role != "assistant" and len(messages) < 2 + (messages[0].role == "system"):
            nothing.append(place)
        else:
            answers += 1
        if number % TOLD == 0:
            yield Working("reading conversations", number, 0)
    if not answers:
        what = "no conversation has an answer to learn from" if nothing else "no conversation in it"
        fix = "Conversations need messages of the role assistant."
        raise SiliconError(what, where=" ".join(sources), fix=fix, kind="bad_data")
    if nothing:
        listed = ", ".join(nothing[:REPORTED]) + (", ..." if len(nothing) > REPORTED else "")
        what = "1 conversation" if len(nothing) == 1 else f"{len(nothing):,} conversations"
        yield Notice(f"left out {what} without an answer to learn from: {listed}", "warning")
    yield from _lost(characters, template)
    return digest.hexdigest()


def _lost(characters: Counter[str], template: Template) -> Iterator[Notice]:
    """Warn of characters that the tokenizer cannot write; SiliconError where they are many."""
    missing = template.tokenizer.missing("".join(characters))
    share = sum(characters[char] for char in missing) / max(1, characters.total())
    what = f"the tokenizer has no {' '.join(repr(char)[1:-1] for char in missing[:12])}"
    if share > MOST_LOST:
        fix = "Tune a model with a byte or bpe tokenizer, which knows all text."
        where = template.tokenizer.kind
        raise SiliconError(f"{what}: {share:.0%} of the conversations' text would be lost", where=where, fix=fix)
    if missing:
        yield Notice(f"{what}: {share:.2%} of the conversations' text is lost", "warning")


def _write(
    stage: Path, name: str, sources: list[str], template: Template, recipe: dict[str, Any]
) -> Generator[Event, None, dict[str, Any]]:
    """Everything in the dataset's folder; returns the card."""
    questions: dict[str, list[Conversation]] = {}
    share, count = Fraction(str(recipe["val_fraction"])), 0
    with ExitStack() as opened:
        splits = {split: _open_split(stage, split, template, opened) for split in ("train", "val")}
        for _, task, messages in _conversations(sources):
            ids, learned = template.encode(messages)
            if not any(learned):
                continue
            held_out = int((count + 1) * share) > int(count * share)
            count += 1
            splits["val" if held_out else "train"].add(messages, ids, learned, template)
            if task and held_out and len(questions.setdefault(task, [])) < QUESTIONS:
                questions[task].append(messages)
            if count % TOLD == 0:
                yield Working("encoding conversations", count, 0)
    for split, written in splits.items():
        if not written.counts["documents"]:
            fix = "Give more of them, or another --val-fraction."
            what = f"too few conversations: none is left for {split}"
            raise SiliconError(what, where=" ".join(sources), fix=fix, kind="bad_data")
    made = template.tokenizer
    card: dict[str, Any] = {"format": FORMAT, "name": name, "kind": "chat", "siliconlm": __version__}
    card["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    card["sources"] = [{"given": source, "files": []} for source in sources]
    card["tokenizer"] = {"kind": made.kind, "size": made.size, "sha256": made.sha256}
    card |= {"template": template.source, "splits": {split: part.card() for split, part in splits.items()}}
    card |= {"recipe": recipe, "tasks": {task: len(asked) for task, asked in questions.items()}}
    write_file(stage / "tokenizer.json", made.json())
    write_file(stage / "questions.json", json.dumps(questions))
    write_file(stage / "dataset.json", json.dumps(card, indent=2) + "\n")
    return card


def _open_split(stage: Path, split: str, template: Template, opened: ExitStack) -> _Split:
    made = template.tokenizer
    tokens = opened.enter_context(ShardWriter(stage / f"{split}.bin", dtype_for(made.size), made.sha256))
    return _Split(tokens, opened.enter_context(ShardWriter(stage / f"{split}.mask.bin", "uint8", made.sha256)))


def read_questions(dataset: Dataset) -> dict[str, list[Conversation]]:
    """The held-out questions of each task of the built-in set; each conversation ends with the right answer."""
    path = dataset.path / "questions.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(task): [tuple(Message(role, content) for role, content in asked) for asked in conversations]
            for task, conversations in found.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        fix = f"Make it again: silicon prepare ... --name {dataset.name} --force"
        raise SiliconError(f"damaged: {error}", where=str(path), fix=fix, kind="bad_data") from None
