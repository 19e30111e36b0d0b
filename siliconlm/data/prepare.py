"""From text to a dataset: a folder with tokenizer.json, train.bin, val.bin and the data card dataset.json.

Two passes in bounded memory: the first counts and hashes, the second encodes. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
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
from siliconlm.data.foreign import TokenFiles, copy_tokens, find_token_files, hash_files
from siliconlm.data.hub import HUB, fetch_tokenizer
from siliconlm.data.remake import remake_command
from siliconlm.data.shards import Shard, ShardWriter, dtype_for
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
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Event, Notice, Prepared, Working
from siliconlm.files import home, staged_folder, sweep, write_file

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")  # a run's name, shorter so that DATA-PRESET is one too
VOCAB_SIZE = 4096  # of a bpe vocabulary where none is given
VAL_FRACTION = 0.1
SHORTEST_TEXT = 200
LEARN_FROM = 100_000_000  # the most bytes of text a BPE vocabulary is learned from
DISTINCT = 4_000_000  # the most bytes of different words: the trainer takes about a hundred times as much memory
BATCH = 1 << 19  # characters encoded at once, on all cores
CODE_POINTS = 0x110000
COUNTS = ("tokens", "documents", "characters", "bytes")  # of each split


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


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Hold a dataset's name for making it. The lock dies with the process; its file goes when the block ends."""
    import fcntl

    path = target.with_name(f".lock-{target.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:  # locked by another, or it ended and removed the file between our open and our lock
            what = f"dataset {target.name} is being prepared by another process"
            fix = "Wait for it, or choose another --name."
            raise SiliconError(what, where=str(target), fix=fix, kind="run_in_use")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def data_folder() -> Path:
    """Where datasets live."""
    return home() / "data"


# --- checks ----------------------------------------------------------------------------------------------------------


def check_arguments(name: str, val_fraction: float) -> None:
    if not NAME.fullmatch(name):
        fix = "Use at most 80 letters, digits, '.', '_' and '-', a letter or digit first: --name my-text"
        raise SiliconError(f"{name!r} cannot be the name of a dataset", where="--name", fix=fix)
    if not 0 < val_fraction < 1:
        fix = "Type --val-fraction 0.1"
        raise SiliconError(f"val_fraction {val_fraction} is not between 0 and 1", where="--val-fraction", fix=fix)


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


def reused(target: Path, recipe: dict[str, Any]) -> Prepared:
    card = _read_card(target)
    other = [key for key, value in recipe.items() if card["recipe"].get(key) != value]
    if other:
        why = "from other text" if "files" in other else "with another " + " and ".join(other)
        what = f"dataset {target.name} exists and was made {why}"
        fix = "Type --name OTHER for a new one, or --force to replace it."
        raise SiliconError(what, where=str(target), fix=fix, kind="cannot_create")
    with open_dataset(str(target)):
        return Prepared(target.name, str(target), card, reused=True)


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


# --- opening ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dataset:
    """A prepared dataset. `card` is its dataset.json."""

    name: str
    path: Path
    card: dict[str, Any]
    tokenizer: Tokenizer
    train: Shard
    val: Shard
    masks: dict[str, Shard] = field(default_factory=dict)  # of conversations: 1 where a token is learned, by split

    @property
    def is_chat(self) -> bool:
        return bool(self.masks)

    @property
    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of validation text a token that is text: what bits per byte are counted over. End-of-text
        tokens, one a document, are none."""
        split = self.card["splits"]["val"]
        return float(split["bytes"] / max(1, split.get("learned_text", split["tokens"] - split["documents"])))

    @property
    def fingerprint(self) -> str:
        """One hash of the tokens, the tokenizer and the split: equal where training would see the same data."""
        counts = [str(self.card["splits"][split]["characters"]) for split in ("train", "val")]
        shards = [self.train, self.val, *self.masks.values()]
        parts = [*(shard.sha256 for shard in shards), self.tokenizer.sha256, *counts]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def verify(self) -> None:
        """Read all files whole and compare them with their hashes."""
        for shard in (self.train, self.val, *self.masks.values()):
            shard.verify()

    def close(self) -> None:
        for shard in (self.train, self.val, *self.masks.values()):
            shard.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def datasets() -> list[str]:
    """The names of the datasets in the home, sorted."""
    folder = data_folder()
    return sorted(path.parent.name for path in folder.glob("*/dataset.json") if not path.parent.name.startswith("."))


def open_dataset(name_or_path: str) -> Dataset:
    """Open a dataset by its name or its folder. Checks that card, tokenizer and token files belong together."""
    path = _find(name_or_path)
    card = _read_card(path)
    try:
        tokenizer = open_tokenizer(path / "tokenizer.json", card["tokenizer"]["kind"])
    except SiliconError as error:
        raise _corrupt(path / "tokenizer.json", error.what) from error
    if tokenizer.sha256 != card["tokenizer"]["sha256"]:
        raise _corrupt(path / "tokenizer.json", "not the tokenizer that made the tokens")
    with ExitStack() as opened:
        shards = {split: opened.enter_context(_open_shard(path, split, card, tokenizer)) for split in ("train", "val")}
        masks = {}
        for split in shards if card.get("kind") == "chat" else ():
            masks[split] = opened.enter_context(_open_mask(path, split, card, shards[split]))
        opened.pop_all()
    return Dataset(path.name, path, card, tokenizer, shards["train"], shards["val"], masks)


def _find(word: str) -> Path:
    for path in (data_folder() / word, Path(word).expanduser()):
        if word and (path / "dataset.json").is_file():
            return path
    if word and "/" not in word and (data_folder() / word).is_dir():
        raise _corrupt(data_folder() / word / "dataset.json", "the file is missing")
    there = datasets()
    listed = f"There are: {', '.join(there)}. " if there else "There are none yet. "
    make = f"Make one: silicon prepare path/to/input.txt --name {word or 'NAME'}"
    fix = (nearest(word, there) + " " + listed + make).strip()
    raise SiliconError(f"no dataset named {word!r}", fix=fix, kind="missing_input")


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        card = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _corrupt(path, "the file is missing") from error
    except ValueError as error:
        raise _corrupt(path, "not JSON") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise _corrupt(path, f"not a data card of format {FORMAT}")
    if not _has_all(card):
        raise _corrupt(path, "entries are missing")
    return card


def _has_all(card: dict[str, Any]) -> bool:
    """Whether every entry that is read later is there and of its type."""
    try:
        splits = [card["splits"][name] for name in ("train", "val")]
        words = [card["tokenizer"]["kind"], card["tokenizer"]["sha256"], *(split["sha256"] for split in splits)]
        counts = [split[name] for split in splits for name in COUNTS]
        typed = all(type(word) is str for word in words) and all(type(count) is int for count in counts)
        return typed and isinstance(card["recipe"], dict)
    except (KeyError, TypeError):
        return False


def _open_shard(folder: Path, split: str, card: dict[str, Any], tokenizer: Tokenizer) -> Shard:
    shard = Shard.open(folder / f"{split}.bin")
    recorded = card["splits"][split]["sha256"]
    if shard.sha256 == recorded and shard.tokenizer == tokenizer.sha256 and shard.vocab_fits(tokenizer.size):
        return shard
    shard.close()
    raise _corrupt(shard.path, "it belongs to another dataset")


def _open_mask(folder: Path, split: str, card: dict[str, Any], shard: Shard) -> Shard:
    mask = Shard.open(folder / f"{split}.mask.bin")
    if mask.sha256 == card["splits"][split].get("mask_sha256") and mask.count == shard.count:
        return mask
    mask.close()
    raise _corrupt(mask.path, "it belongs to another dataset")


def _corrupt(path: Path, why: str) -> SiliconError:
    fix = f"Make it again: {remake_command(path.parent)}"
    return SiliconError(f"damaged dataset: {why}", where=str(path), fix=fix, kind="bad_data")
