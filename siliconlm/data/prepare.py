"""From text to a dataset: a folder with tokenizer.json, train.bin, val.bin and the data card dataset.json.

Two passes in bounded memory: the first counts and hashes, the second encodes. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from siliconlm import __version__
from siliconlm.data import builtin
from siliconlm.data.dataset import FORMAT, alone, check_arguments, data_folder, reused
from siliconlm.data.foreign import TokenFiles, copy_tokens, find_token_files, hash_files
from siliconlm.data.hub import HUB, fetch_tokenizer
from siliconlm.data.shards import ShardWriter, dtype_for
from siliconlm.data.sources import BUILTIN_SEED, Document, Source, builtin_pieces, open_sources
from siliconlm.data.tokenizer import (
    KINDS,
    Part,
    Tokenizer,
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    check_vocab_size,
    chunks,
    open_tokenizer,
)
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Prepared, Working
from siliconlm.files import staged_folder, sweep, write_file

VOCAB_SIZE = 4096  # of a bpe vocabulary where none is given
VAL_FRACTION = 0.1
SHORTEST_TEXT = 200
LEARN_FROM = 100_000_000  # the most bytes of text a BPE vocabulary is learned from
DISTINCT = 4_000_000  # the most bytes of different words: the trainer takes about a hundred times as much memory
BATCH = 1 << 19  # characters encoded at once, on all cores
CODE_POINTS = 0x110000


@dataclass(slots=True)
class _Scanned:
    """What the first pass found out about one document: `size` bytes of file, which hold `bytes` of text."""

    document: Document
    state: tuple[int, ...]
    size: int = 0
    sha256: str = ""
    characters: int = 0
    bytes: int = 0
    empty: int = 0


@dataclass(slots=True)
class _Text:
    """All documents in a row, and where the validation text begins."""

    sources: list[Source]
    documents: list[_Scanned] = field(default_factory=list)
    alphabet: set[str] = field(default_factory=set)
    n_train: int = 0

    @property
    def characters(self) -> int:
        return sum(item.characters for item in self.documents)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a dataset is made of: `recipe` decides all tokens; `write` makes the files and returns the card's facts."""

    recipe: dict[str, Any]
    write: Callable[[Path], Generator[Event, None, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Span:
    """The part of a document that belongs to one split, in characters."""

    item: _Scanned
    start: int
    end: int


def prepare(
    sources: list[str],
    name: str,
    tokenizer: str | None = None,
    vocab_size: int = VOCAB_SIZE,
    val_fraction: float = VAL_FRACTION,
    force: bool = False,
    folder: Path | None = None,
    field: str | None = None,
) -> Iterator[Event]:
    """Make the dataset `name` out of `sources` (see `open_sources`), in `folder` or the home's data folder.

    `tokenizer` is byte (the default), char, bpe (with `vocab_size`), the path of a tokenizer.json or hf://OWNER/NAME.
    `field` holds the text of a record. The last `val_fraction` of all characters is for validation. Of a folder of
    another program's token files (see `find_token_files`) tokens, split and tokenizer stay as they are. A dataset that
    was made from the same text in the same way is used again.
    """
    check_arguments(name, val_fraction)
    given = given_tokenizer(tokenizer or "byte")
    found = _find_tokens(sources)
    target = (folder or data_folder()) / name
    to_make = force or not target.exists()
    with alone(target) if to_make else nullcontext():  # many may use a dataset again at once
        if found:
            yield from _unused(field, vocab_size, val_fraction)
            plan = yield from _token_plan(found, given if tokenizer else None, tokenizer)
        else:
            size = (yield from _rounded(vocab_size)) if tokenizer == "bpe" else None
            plan = yield from _text_plan(sources, field, tokenizer or "byte", given, size, val_fraction)
        if not to_make or (target.exists() and not force):  # the latter: made just before the lock
            yield reused(target, plan.recipe)
            return
        sweep(target.parent, name)
        with staged_folder(target, replace=force) as stage:
            facts = yield from plan.write(stage)
            card = _card(name, plan.recipe, facts)
            write_file(stage / "dataset.json", json.dumps(card, indent=2) + "\n")
    yield Prepared(name, str(target), card)


# --- checks ----------------------------------------------------------------------------------------------------------


def given_tokenizer(word: str) -> Tokenizer | None:
    """The tokenizer that stands before the text is read; none for those that depend on it."""
    if word == "byte":
        return byte_tokenizer()
    if word.startswith(HUB):
        return open_tokenizer(fetch_tokenizer(word), word)
    return None if word in KINDS else open_tokenizer(Path(word).expanduser())


def _check_length(text: _Text) -> None:
    if text.characters < SHORTEST_TEXT:
        what = f"the text is too small: {text.characters} characters, at least {SHORTEST_TEXT} are needed"
        raise SiliconError(what, where=_given(text), fix="Give more text.", kind="bad_data")


def _given(text: _Text) -> str:
    return " ".join(source.name for source in text.sources)


def _rounded(vocab_size: int) -> Generator[Event, None, int]:
    """The next multiple of 64, to which a model's embedding is padded anyway."""
    check_vocab_size(vocab_size)
    size = -(-vocab_size // 64) * 64
    if size != vocab_size:
        yield Notice(f"--vocab-size {vocab_size} was rounded up to {size}, a multiple of 64")
    return size


def _text_plan(
    sources: list[str],
    field: str | None,
    tokenizer: str,
    given: Tokenizer | None,
    vocab_size: int | None,
    val_fraction: float,
) -> Generator[Event, None, _Plan]:
    """Read the text once, to count it."""
    text = _Text((yield from open_sources(sources, field)))
    yield from _scan(text, alphabet=tokenizer == "char")
    text.n_train = int(text.characters * (1 - Fraction(str(val_fraction))))
    _check_length(text)
    recipe = {
        "files": [item.sha256 + " of records" * item.document.records for item in text.documents],
        "field": field,
        "tokenizer": given.sha256 if given else tokenizer,
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
    }
    return _Plan(recipe, partial(_write_text, text, given, vocab_size))


# --- first pass: counting --------------------------------------------------------------------------------------------


def _scan(text: _Text, alphabet: bool) -> Iterator[Event]:
    """Count and hash every document; collect the characters where the tokenizer needs them."""
    documents = [document for source in text.sources for document in source.documents]
    total = sum(document.size for document in documents)
    seen = np.zeros(CODE_POINTS, dtype=bool)
    done = 0
    for document in documents:
        item = _Scanned(document, document.state())
        for piece in _count(item):
            if alphabet:
                seen[np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32)] = True
            yield Working("reading", min(done + item.size, total), total, "bytes")
        text.documents.append(item)
        done += item.size
    text.alphabet = {chr(code) for code in np.flatnonzero(seen)}
    empty = sum(item.empty for item in text.documents)
    if empty:
        yield Notice(f"left out {empty:,} records without text (empty, null or only white space)")


def _count(item: _Scanned) -> Iterator[str]:
    """The text of a document, in pieces; fills `item` on the way."""
    digest = hashlib.sha256()

    def watch(piece: bytes) -> None:
        digest.update(piece)
        item.size += len(piece)

    for batch in _batches(item.document.parts(watch=watch)):
        piece = "".join(part for _, part in batch)
        item.empty += sum(not part for _, part in batch)
        item.characters += len(piece)
        item.bytes += len(piece.encode())
        yield piece
    item.sha256 = digest.hexdigest()


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Parts to work on together: small texts share a batch."""
    batch: list[Part] = []
    held = 0
    for part in parts:
        batch.append(part)
        held += len(part[1])
        if held >= BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def _make_tokenizer(text: _Text, vocab_size: int | None) -> Generator[Event, None, Tokenizer]:
    if vocab_size is None:
        return char_tokenizer(text.alphabet)
    yield Working(f"learning a vocabulary of {vocab_size:,} tokens", 0, 0)
    size = _learnable(text)
    made = bpe_tokenizer(_sample(text, size), vocab_size)
    if size < _train_bytes(text):
        yield Notice(f"the vocabulary was learned from {size / 1e6:.0f} MB of the training text, taken evenly")
    if made.size < vocab_size:
        yield Notice(
            f"the vocabulary has {made.size:,} tokens, not {vocab_size:,}: the text has no more pairs to merge"
        )
    return made


def _train_bytes(text: _Text) -> int:
    """About how many bytes the training text has."""
    return sum(item.bytes for item in text.documents) * text.n_train // text.characters


def _learnable(text: _Text) -> int:
    """How many bytes to learn from: few where words hardly repeat, for each different one takes memory."""
    if _train_bytes(text) <= DISTINCT:
        return _train_bytes(text)
    words = {word for chunk in _sample(text, DISTINCT) for word in chunk.split()}
    distinct = sum(len(word.encode()) for word in words)
    return min(LEARN_FROM, _train_bytes(text), DISTINCT * DISTINCT // distinct)


def _sample(text: _Text, size: int) -> Iterator[str]:
    """About `size` bytes of the training text, in chunks taken evenly. The validation text stays unseen.

    Small chunks also bound the length of a "word": what a merge costs the trainer grows with the words it stands in,
    so that a text without spaces would take hours.
    """
    share = min(1.0, size / _train_bytes(text))
    owed = 0.0
    for span in _spans(text, 0, text.n_train):
        for _, chunk in chunks(_parts(span), size=256, longest=512):
            owed += share
            if owed >= 1:
                owed -= 1
                yield chunk


def _warn(text: _Text, made: Tokenizer) -> Iterator[Notice]:
    """Say so where a given tokenizer changes the text, or sees the beginning of a text in its own way."""
    if made.kind in KINDS:
        return
    _, beginning = next(chunks(_parts(_spans(text, 0, text.n_train)[0])))
    lost = made.missing(beginning)
    if lost:
        shown = " ".join(repr(character)[1:-1] for character in lost[:10])
        yield Notice(f"{made.kind} loses {len(lost)} characters of this text: {shown}", level="warning")
    parts = [part for _, part in chunks([(True, beginning)], size=len(beginning) // 2)]
    if list(chain.from_iterable(made.encode_batch(parts))) != made.encode(beginning):
        message = f"{made.kind} treats the beginning of a text in its own way: a few tokens at chunk borders differ"
        yield Notice(message, level="warning")


# --- second pass: encoding -------------------------------------------------------------------------------------------


def _write_text(
    text: _Text, given: Tokenizer | None, vocab_size: int | None, stage: Path
) -> Generator[Event, None, dict[str, Any]]:
    """Everything in the dataset's folder but the card; returns what the card says of it."""
    made = given or (yield from _make_tokenizer(text, vocab_size))
    yield from _warn(text, made)
    splits = {}
    for split, start, end in (("train", 0, text.n_train), ("val", text.n_train, text.characters)):
        with ShardWriter(stage / f"{split}.bin", dtype_for(made.size), made.sha256) as shard:
            parts = chain.from_iterable(map(_parts, _spans(text, start, end)))
            counts = yield from _encode(parts, made, shard, start, text.characters)
        if counts["tokens"] - counts["documents"] < 2:
            what = f"the text is too small: {split} has {counts['tokens'] - counts['documents']} tokens of text"
            fix = "Give more text, or another --val-fraction."
            raise SiliconError(what, where=_given(text), fix=fix, kind="bad_data")
        splits[split] = counts | {"sha256": shard.sha256}
    for item in text.documents:
        if item.document.state() != item.state:
            raise _changed(item.document)
    write_file(stage / "tokenizer.json", made.json())
    facts: dict[str, Any] = {"sources": _source_entries(text), "tokenizer": _tokenizer_entry(made), "splits": splits}
    if any(source.builtin for source in text.sources):
        facts["seed"] = BUILTIN_SEED
    if len(text.sources) == 1 and text.sources[0].builtin:
        facts["entropy_floor"] = _entropy_floor(text)
    return facts


def _spans(text: _Text, start: int, end: int) -> list[_Span]:
    """The parts of documents that lie between two characters of the whole text."""
    spans = []
    first = 0
    for item in text.documents:
        last = first + item.characters
        if first < end and last > start:
            spans.append(_Span(item, max(start, first) - first, min(end, last) - first))
        first = last
    return spans


def _parts(span: _Span) -> Iterator[Part]:
    """The text of a span, in pieces; what it begins with begins a text. Notices when a file has become shorter."""
    at = 0
    inside = False
    for begins, piece in span.item.document.parts():
        part = piece[max(0, span.start - at) : max(0, span.end - at)]
        at += len(piece)
        if part:
            yield begins or not inside, part
            inside = True
        if at >= span.end:
            return
    raise _changed(span.item.document)


def _changed(document: Document) -> SiliconError:
    fix = "Wait until nothing writes to it, and prepare again."
    return SiliconError("the file changed while it was read", where=document.name, fix=fix, kind="bad_data")


def _encode(
    parts: Iterator[Part], made: Tokenizer, shard: ShardWriter, done: int, total: int
) -> Generator[Event, None, dict[str, int]]:
    """Write the tokens of one split, each text after an end-of-text token; returns what was counted."""
    counts = {"documents": 0, "characters": 0, "bytes": 0}
    for batch, ids in _encoded(parts, made):
        shard.write(ids)
        text = "".join(chunk for _, chunk in batch)
        counts["documents"] += sum(begins for begins, _ in batch)
        counts["characters"] += len(text)
        counts["bytes"] += len(text.encode())
        yield Working("encoding", done + counts["characters"], total, "characters")
    return counts | {"tokens": shard.count}


def _encoded(parts: Iterator[Part], made: Tokenizer) -> Iterator[tuple[list[Part], np.ndarray[Any, Any]]]:
    """Batches with their tokens. While one is encoded the next one is read."""
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[tuple[list[Part], Future[np.ndarray[Any, Any]]]] = deque()
        for batch in _batches(chunks(parts)):
            ahead.append((batch, pool.submit(made.encode_parts, batch)))
            if len(ahead) > 1:
                first, ids = ahead.popleft()
                yield first, ids.result()
        for last, ids in ahead:
            yield last, ids.result()


# --- token files of other programs -----------------------------------------------------------------------------------


def _find_tokens(sources: list[str]) -> TokenFiles | None:
    found = [tokens for word in sources if word and (tokens := find_token_files(Path(word).expanduser()))]
    if found and len(sources) > 1:
        fix = f"Type: silicon prepare {shlex.quote(str(found[0].folder))}"
        raise SiliconError("a folder of token files stands alone", where=str(found[0].folder), fix=fix, kind="bad_data")
    return found[0] if found else None


def _unused(field: str | None, vocab_size: int, val_fraction: float) -> Iterator[Notice]:
    """Say so where a wish means nothing to tokens that are there already."""
    wishes = {
        "--field": field,
        "--vocab-size": vocab_size != VOCAB_SIZE,
        "--val-fraction": val_fraction != VAL_FRACTION,
    }
    for flag in (flag for flag, wished in wishes.items() if wished):
        yield Notice(f"{flag} was not used: the files hold tokens, already split", level="warning")


def _token_plan(found: TokenFiles, given: Tokenizer | None, word: str | None) -> Generator[Event, None, _Plan]:
    if word in KINDS:
        fix = "Type --tokenizer and the path of the tokenizer.json that made the tokens."
        what = f"the tokens are there already, --tokenizer {word} cannot make them"
        raise SiliconError(what, where=str(found.folder), fix=fix)
    made = found.tokenizer(given)
    hashes = yield from hash_files(found)
    recipe = {"files": [*hashes["train"], *hashes["val"]], "field": None, "tokenizer": made.sha256}
    recipe |= {"vocab_size": None, "val_fraction": None}
    return _Plan(recipe, partial(_write_tokens, found, made, hashes))


def _write_tokens(
    found: TokenFiles, made: Tokenizer, hashes: dict[str, list[str]], stage: Path
) -> Generator[Event, None, dict[str, Any]]:
    """As `_write_text`, with what it takes to write the files again as they were."""
    splits = {}
    for split in found.files:
        with ShardWriter(stage / f"{split}.bin", dtype_for(made.size), made.sha256) as shard:
            counts = yield from copy_tokens(found, split, made, shard, hashes[split])
        if shard.count < 2:
            what = f"too few tokens: {split} has {shard.count}"
            raise SiliconError(what, where=str(found.folder), fix="Give more.", kind="bad_data")
        splits[split] = counts | {"sha256": shard.sha256}
    write_file(stage / "tokenizer.json", made.json())
    meta = found.folder / "meta.pkl"
    if found.format == "nanogpt" and meta.is_file():
        write_file(stage / "meta.pkl", meta.read_bytes())
    sources = [{"given": str(found.folder), "files": found.entries(hashes)}]
    return {"sources": sources, "tokenizer": _tokenizer_entry(made), "splits": splits, "foreign": found.layout()}


# --- the data card ---------------------------------------------------------------------------------------------------


def _card(name: str, recipe: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    card: dict[str, Any] = {"format": FORMAT, "name": name, "siliconlm": __version__}
    card["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    return card | facts | {"recipe": recipe}


def _tokenizer_entry(made: Tokenizer) -> dict[str, Any]:
    return {"kind": made.kind, "size": made.size, "sha256": made.sha256}


def _source_entries(text: _Text) -> list[dict[str, Any]]:
    items = iter(text.documents)
    entries = []
    for source in text.sources:
        own = [next(items) for _ in source.documents]
        files = [{"name": item.document.name, "bytes": item.size, "sha256": item.sha256} for item in own]
        entries.append({"given": source.name, "files": files})
    return entries


def _entropy_floor(text: _Text) -> dict[str, float]:
    """Nats per character that no model can beat on average: of the grammar, and what this validation text cost it."""
    at, nats = 0, 0.0
    for piece in builtin_pieces():
        before, at = at, at + len(piece.text)
        if at > text.n_train:
            nats += piece.nats * (at - max(before, text.n_train)) / len(piece.text)
    return {"grammar": builtin.entropy_rate(), "val": nats / (text.characters - text.n_train)}
