"""A dataset on disk: where it lies, what it is called, how it is opened. prepare.py and conversations.py make them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siliconlm.data.remake import remake_command
from siliconlm.data.shards import Shard
from siliconlm.data.tokenizer import (
    Tokenizer,
    open_tokenizer,
)
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Prepared
from siliconlm.files import home

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")  # a run's name, shorter so that DATA-PRESET is one too
COUNTS = ("tokens", "documents", "characters", "bytes")  # of each split


def data_folder() -> Path:
    """Where datasets live."""
    return home() / "data"


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


# --- for those that make one -----------------------------------------------------------------------------------------


def check_arguments(name: str, val_fraction: float) -> None:
    if not NAME.fullmatch(name):
        fix = "Use at most 80 letters, digits, '.', '_' and '-', a letter or digit first: --name my-text"
        raise SiliconError(f"{name!r} cannot be the name of a dataset", where="--name", fix=fix)
    if not 0 < val_fraction < 1:
        fix = "Type --val-fraction 0.1"
        raise SiliconError(f"val_fraction {val_fraction} is not between 0 and 1", where="--val-fraction", fix=fix)


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
