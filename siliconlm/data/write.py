"""A dataset written out as the token files of nanoGPT or llm.c, which find_token_files reads again."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from siliconlm.data.dataset import Dataset, open_dataset
from siliconlm.data.foreign import HEADER, KINDS, Ids
from siliconlm.data.shards import DTYPES, Shard
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Event, Notice, Working, Written
from siliconlm.files import staged_folder, sync, write_file

FORMATS = ("nanogpt", "llmc")
SHARD = 100_000_000  # tokens of a file of llm.c's
FIRST = {"train": 1, "val": 0}  # the number of a split's first file
LARGEST_ID = 65535
READ = 1 << 20  # tokens read at once


def write_tokens(name_or_path: str, format: str, output: Path) -> Iterator[Event]:
    """Write a dataset as the token files of nanoGPT (`nanogpt`) or llm.c (`llmc`) into the new folder `output`.

    nanoGPT's documents end with the end-of-text token, llm.c's begin with it, nanoGPT's characters stand alone. A
    dataset that came from such files gives them back byte for byte.
    """
    if format not in FORMATS:
        fix = nearest(format, FORMATS) or f"Type --write {FORMATS[0]}, or --write {FORMATS[1]}"
        raise SiliconError(f"--write {format} is not known", fix=fix)
    if output.exists():
        raise SiliconError("the folder exists", where=str(output), fix="Type another --output.", kind="cannot_create")
    with open_dataset(name_or_path) as dataset, staged_folder(output) as stage:
        if dataset.is_chat:
            yield Notice("the files cannot say which tokens are learned: other programs learn all", level="warning")
        if dataset.card.get("foreign", {}).get("format") == format:
            yield from _as_they_were(dataset, stage)
        else:
            yield from _nanogpt(dataset, stage) if format == "nanogpt" else _llmc(dataset, stage)
        names = sorted(path.name for path in stage.iterdir())
    yield Written(dataset.name, format, str(output), names)


def _shards(dataset: Dataset) -> dict[str, Shard]:
    return {"train": dataset.train, "val": dataset.val}


def _as_they_were(dataset: Dataset, stage: Path) -> Iterator[Event]:
    """The files that the dataset came from."""
    for split, shard in _shards(dataset).items():
        files = [
            _File(
                entry["name"], bytes.fromhex(entry["header"]).ljust(HEADER, b"\0")[: entry["offset"]], entry["tokens"]
            )
            for entry in dataset.card["foreign"]["files"][split]
        ]
        yield from _write(stage, files, _read(shard, 0, shard.count))
    if (dataset.path / "meta.pkl").is_file():
        write_file(stage / "meta.pkl", (dataset.path / "meta.pkl").read_bytes())


def _nanogpt(dataset: Dataset, stage: Path) -> Iterator[Event]:
    if dataset.tokenizer.kind == "char" and not dataset.is_chat:
        yield from _characters(dataset, stage)
        return
    eos = dataset.tokenizer.eos
    for split, shard in _shards(dataset).items():
        if shard.largest > LARGEST_ID:
            what = f"nanoGPT's files hold ids up to {LARGEST_ID:,}, and this dataset's go up to {shard.largest:,}"
            raise SiliconError(what, where=str(shard.path), fix="Type --write llmc", kind="bad_data")
        first, last = _ends(shard)
        ends = last == eos
        start = int(first == eos and not ends)
        ids = chain(_read(shard, start, shard.count), [] if ends else [np.array([eos])])
        yield from _write(stage, [_File(f"{split}.bin", b"", shard.count - start + (not ends))], ids)
    write_file(stage / "tokenizer.json", dataset.tokenizer.json())


def _characters(dataset: Dataset, stage: Path) -> Iterator[Event]:
    """nanoGPT's files for characters: they are numbered from 0, and nothing stands between documents."""
    made = dataset.tokenizer
    known = {id: text for id in range(made.size) if (text := made.bytes_of(id).decode(errors="ignore"))}
    numbers = np.full(made.size, -1)
    numbers[list(known)] = np.arange(len(known))
    splits = dataset.card["splits"]
    for split, shard in _shards(dataset).items():
        ids = (numbers[piece[piece != made.eos]] for piece in _read(shard, 0, shard.count))
        yield from _write(stage, [_File(f"{split}.bin", b"", splits[split]["characters"])], ids)
    if splits["train"]["documents"] + splits["val"]["documents"] > 2:
        yield Notice("nanoGPT's files for characters hold nothing between documents: their borders were left out")
    itos = dict(enumerate(known.values()))
    meta = {"vocab_size": len(known), "itos": itos, "stoi": {char: id for id, char in itos.items()}}
    write_file(stage / "meta.pkl", pickle.dumps(meta))


def _llmc(dataset: Dataset, stage: Path) -> Iterator[Event]:
    eos = dataset.tokenizer.eos
    magic, version = next(kind for kind, dtype in KINDS.items() if dtype == dataset.train.dtype)
    for split, shard in _shards(dataset).items():
        first, last = _ends(shard)
        begins = first == eos
        end = shard.count - int(last == eos and not begins)
        ids = chain([] if begins else [np.array([eos])], _read(shard, 0, end))
        files = []
        left = end + (not begins)
        for number in count(FIRST[split]):
            tokens = min(left, SHARD)
            header = np.array([magic, version, tokens], dtype="<i4").tobytes().ljust(HEADER, b"\0")
            files.append(_File(f"{dataset.name}_{split}_{number:06d}.bin", header, tokens))
            left -= tokens
            if not left:
                break
        yield from _write(stage, files, ids)
    write_file(stage / "tokenizer.json", dataset.tokenizer.json())


# --- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    """A file to be written: its name, what stands before the tokens, and how many there are."""

    name: str
    header: bytes
    tokens: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of nanoGPT where there is no header."""
        magic, version = np.frombuffer(self.header[:8], dtype="<i4").tolist() or next(iter(KINDS))
        return DTYPES[KINDS[magic, version]]


def _ends(shard: Shard) -> tuple[int, int]:
    return int(shard.read(0, 1)[0]), int(shard.read(shard.count - 1, 1)[0])


def _read(shard: Shard, start: int, end: int) -> Iterator[Ids]:
    return (shard.read(at, min(READ, end - at)) for at in range(start, end, READ))


def _write(stage: Path, files: list[_File], ids: Iterator[Ids]) -> Iterator[Event]:
    """The tokens one after the other into the files."""
    total = sum(file.tokens for file in files)
    done = 0
    rest = np.empty(0, dtype=np.int64)
    for file in files:
        with open(stage / file.name, "xb") as out:
            out.write(file.header)
            left = file.tokens
            while left:
                if not len(rest):
                    rest = next(ids)
                part, rest = rest[:left], rest[left:]
                out.write(part.astype(file.dtype).tobytes())
                left -= len(part)
                done += len(part)
                yield Working(f"writing {file.name}", done, total, "tokens")
            out.flush()
            sync(out.fileno())
