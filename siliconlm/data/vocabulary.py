"""What a tokenizer is, and what it makes of a text, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siliconlm.data.dataset import Dataset, datasets, open_dataset
from siliconlm.data.hub import HUB, fetch_tokenizer
from siliconlm.data.tokenizer import Tokenizer, open_tokenizer

SHOWN = 200  # tokens of a validation text


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer and the tokens of a text. `bytes_per_token` is of `measured`; without a text it is None."""

    kind: str
    size: int
    sha256: str
    bytes_per_token: float | None
    measured: str
    ids: list[int]
    pieces: list[str]


def describe(word: str, data: str | None = None, text: str | None = None) -> Vocabulary:
    """The tokenizer of a dataset, of a file or folder, or of hf://OWNER/NAME, and how it cuts `text`.

    Without a text it is the validation text of the dataset, or of the dataset `data`, if that has the same tokenizer.
    """
    if is_dataset(word):
        with open_dataset(word) as dataset:
            return _described(dataset.tokenizer, text, dataset)
    tokenizer = open_tokenizer(fetch_tokenizer(word) if word.startswith(HUB) else Path(word).expanduser())
    if data and is_dataset(data):
        with open_dataset(data) as dataset:
            same = dataset.tokenizer.sha256 == tokenizer.sha256
            return _described(tokenizer, text, dataset if same else None)
    return _described(tokenizer, text, None)


def is_tokenizer(word: str) -> bool:
    """Whether `describe` knows where to look."""
    path = Path(word).expanduser()
    return is_dataset(word) or word.startswith(HUB) or path.is_file() or (path / "tokenizer.json").is_file()


def is_dataset(word: str) -> bool:
    """Whether a dataset has this name, or this is the folder of one."""
    return word in datasets() or (Path(word).expanduser() / "dataset.json").is_file()


def _described(made: Tokenizer, text: str | None, dataset: Dataset | None) -> Vocabulary:
    ids: list[int] = []
    rate, measured = None, ""
    if text is not None:
        ids = made.encode(text)
        rate, measured = len(text.encode()) / max(1, len(ids)), "this text"
    elif dataset:
        ids = dataset.val.read(0, min(SHOWN, dataset.val.count)).tolist()
        rate, measured = dataset.val_bytes_per_token, f"the validation text of {dataset.name}"
    return Vocabulary(made.kind, made.size, made.sha256, rate, measured, ids, [piece(made, id) for id in ids])


def piece(made: Tokenizer, id: int) -> str:
    """What a token says. Special tokens go by their names; bytes that are no character alone are written <0xE2>."""
    if id in made.special_ids or not made.is_byte_level:
        return made.name_of(id)
    text = made.bytes_of(id).decode(errors="surrogateescape")
    return "".join(f"<0x{ord(char) - 0xDC00:02X}>" if "\udc80" <= char <= "\udcff" else char for char in text)
