"""Token files that other programs wrote, read as they are: nanoGPT's, llm.c's and TinyRecursiveModels'.

nanoGPT has train.bin and val.bin, bare uint16, and for characters meta.pkl. llm.c (and modded-nanogpt) has shards with
a header of 256 int32. TinyRecursiveModels has folders with dataset.json and arrays of padded rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siliconlm.data.shards import DTYPES, MAGIC, ShardWriter
from siliconlm.data.tokenizer import Tokenizer, numbered_char_tokenizer, open_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Working
from siliconlm.files import PIECE, sha256

HEADER = 1024
# The first numbers of llm.c's header: magic and version, for GPT-2 and for Llama 3.
KINDS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
SPLITS = {"train": ("train",), "val": ("val", "test")}  # what other programs call ours
LARGEST_META = 16 << 20
LONGEST_TEXT = 4 << 20  # tokens without an end of text that are decoded at once

Ids = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file of tokens after a header. In rows of `row` tokens the last ones may be `pad`, to be left out."""

    path: Path
    header: bytes
    dtype: np.dtype[Any]
    tokens: int
    row: int = 1
    pad: int | None = None

    def read(self, watch: Callable[[bytes], object]) -> Iterator[Ids]:
        """The tokens without padding, in pieces. `watch` sees the bytes of the file."""
        size = self.dtype.itemsize * self.row
        with open(self.path, "rb") as file:
            watch(file.read(len(self.header)))
            while data := file.read(max(1, PIECE // size) * size):
                watch(data)
                if len(data) % size:
                    raise _bad(self.path, "the file changed while it was read")
                yield self._unpadded(np.frombuffer(data, dtype=self.dtype))

    def entry(self) -> dict[str, Any]:
        """Name, header and count: the tokens begin at `offset`."""
        header = self.header.rstrip(b"\0").hex()
        return {"name": self.path.name, "header": header, "offset": len(self.header), "tokens": self.tokens}

    def _unpadded(self, ids: Ids) -> Ids:
        if self.pad is None:
            return ids
        rows = ids.reshape(-1, self.row)
        lengths = self.row - np.argmax(rows[:, ::-1] != self.pad, axis=1)
        lengths[(rows == self.pad).all(axis=1)] = 0
        return rows[np.arange(self.row) < lengths[:, None]]


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """A folder of token files: those of `train` and `val`, in order. `format` is nanogpt, llmc or trm."""

    format: str
    folder: Path
    files: dict[str, list[TokenFile]]

    def tokenizer(self, given: Tokenizer | None) -> Tokenizer:
        """The tokenizer that made the tokens: the one given, else what the folder says."""
        meta = self.folder / "meta.pkl"
        if given:
            return given
        if self.format == "nanogpt" and meta.is_file():
            return numbered_char_tokenizer(read_meta(meta))
        for path in (self.folder / "tokenizer.json", self.folder / "tokenizer" / "tokenizer.json"):
            if path.is_file():
                return open_tokenizer(path)
        what = "the tokens do not say which tokenizer made them"
        fix = (
            "Type --tokenizer and the path of its tokenizer.json (for GPT-2's: --tokenizer hf://openai-community/gpt2)."
        )
        raise SiliconError(what, where=str(self.folder), fix=fix, kind="missing_input")

    def entries(self, hashes: dict[str, list[str]]) -> list[dict[str, Any]]:
        """What a data card says of the files as sources."""
        return [
            {"name": str(file.path), "bytes": file.path.stat().st_size, "sha256": digest}
            for split, files in self.files.items()
            for file, digest in zip(files, hashes[split], strict=True)
        ]

    def layout(self) -> dict[str, Any]:
        """What it takes to write the tokens back, file by file. Headers end with zeros, which are left out."""
        files = {split: [file.entry() for file in files] for split, files in self.files.items()}
        return {"format": self.format, "files": files}


def find_token_files(folder: Path) -> TokenFiles | None:
    """The token files of another program in a folder, checked by their headers and sizes; None where there are none."""
    if not folder.is_dir():
        return None
    return _binaries(folder) or _arrays(folder)


# --- nanoGPT and llm.c -----------------------------------------------------------------------------------------------


def _binaries(folder: Path) -> TokenFiles | None:
    plain = {split: [path for path in [folder / f"{split}.bin"] if path.is_file()] for split in SPLITS}
    names = sorted(path for path in folder.glob("*.bin") if path.is_file())
    shards = {
        split: [path for path in names if re.fullmatch(rf".+_{split}(_\d+)?\.bin", path.name)] for split in SPLITS
    }
    paths = plain if any(plain.values()) else shards
    if not any(paths.values()):
        return None
    for split in SPLITS:
        if not paths[split]:
            there = next(path.name for found in paths.values() for path in found)
            fix = f"Put it beside {there}, or give text: silicon prepare path/to/input.txt"
            raise SiliconError(f"no {split} tokens beside {there}", where=str(folder), fix=fix, kind="missing_input")
    files = {split: [_binary(path, paths is plain) for path in paths[split]] for split in SPLITS}
    bare = not any(file.header for found in files.values() for file in found)
    return TokenFiles("nanogpt" if bare else "llmc", folder, files)


def _binary(path: Path, may_be_bare: bool) -> TokenFile:
    """A file of tokens, with llm.c's header or, where it may be, without one."""
    with open(path, "rb") as file:
        header = file.read(HEADER)
    if header.startswith(MAGIC):
        what = "this is a dataset of SiliconLM already"
        fix = f"Type: silicon train --data {path.parent}"
        raise SiliconError(what, where=str(path.parent), fix=fix, kind="bad_data")
    magic, version, count = np.frombuffer(header[:12].ljust(12, b"\0"), dtype="<i4").tolist()
    name = KINDS.get((magic, version))
    if name is None:
        if not may_be_bare:
            known = " or ".join(f"{magic} {version}" for magic, version in KINDS)
            raise _bad(path, f"the header begins with {magic} {version}, not {known}")
        size = path.stat().st_size
        if size % 2:
            raise _bad(path, f"an odd number of bytes ({size:,}) cannot be tokens of two")
        return TokenFile(path, b"", DTYPES["uint16"], size // 2)
    _check_size(path, HEADER + count * DTYPES[name].itemsize, f"the {count:,} tokens that its header tells of")
    return TokenFile(path, header, DTYPES[name], count)


def _check_size(path: Path, expected: int, of: str) -> None:
    size = path.stat().st_size
    if size != expected:
        how = "cut short" if size < expected else "too long"
        raise _bad(path, f"{how}: {size:,} bytes, but {of} take {expected:,}")


def _bad(path: Path, what: str) -> SiliconError:
    return SiliconError(what, where=str(path), fix="Make the file again, or fetch it again.", kind="bad_data")


# --- nanoGPT's meta.pkl ----------------------------------------------------------------------------------------------


class _Plain(pickle.Unpickler):
    """Admits what needs no code: dict, list, str and int."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def read_meta(path: Path) -> list[str]:
    """The characters that nanoGPT's meta.pkl numbers, by their ids. No code in the file is run."""
    if path.stat().st_size > LARGEST_META:
        raise _bad_meta(path, f"larger than {LARGEST_META >> 20} MiB")
    try:
        with open(path, "rb") as file:
            meta = _Plain(file).load()
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise _bad_meta(path, str(error)) from error
    numbers = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(numbers, dict):
        raise _bad_meta(path, "no `stoi` in it")
    if not all(type(char) is str and len(char) == 1 and type(id) is int for char, id in numbers.items()):
        raise _bad_meta(path, "`stoi` does not number characters")
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise _bad_meta(path, f"the ids of its {len(numbers)} characters are not 0 to {len(numbers) - 1}, each once")
    if any("\ud800" <= char <= "\udfff" for char in numbers):
        raise _bad_meta(path, "half a surrogate pair is no character")
    return sorted(numbers, key=numbers.__getitem__)


def _bad_meta(path: Path, why: str) -> SiliconError:
    fix = "Type --tokenizer and the path of the tokenizer.json that made the tokens."
    return SiliconError(f"not nanoGPT's meta.pkl: {why}", where=str(path), fix=fix, kind="bad_data")


# --- TinyRecursiveModels ---------------------------------------------------------------------------------------------


def _arrays(folder: Path) -> TokenFiles | None:
    found = {split: _split_folder(folder, names) for split, names in SPLITS.items()}
    if not found["train"] or not found["val"]:
        return None
    return TokenFiles("trm", folder, {split: _rows(path) for split, path in found.items() if path})


def _split_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    paths = (folder / name for name in names)
    return next((path for path in paths if (path / "dataset.json").is_file() and [*path.glob("*__inputs.npy")]), None)


def _rows(folder: Path) -> list[TokenFile]:
    path = folder / "dataset.json"
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"not JSON: {error}") from error
    pad = facts.get("pad_id") if isinstance(facts, dict) else None
    if type(pad) is not int:
        raise _bad(path, "no number `pad_id` in it, which says what the rows are padded with")
    return [_array(array, pad) for array in sorted(folder.glob("*__inputs.npy"))]


def _array(path: Path, pad: int) -> TokenFile:
    """An array of rows of integers. Only its header is read, and no object in it is ever made."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(file)
        except ValueError as error:
            raise _bad(path, f"not an array of NumPy: {error}") from error
        size = file.tell()
        file.seek(0)
        header = file.read(size)
    if len(shape) != 2 or dtype.kind not in "iu" or columns_first or not shape[1]:
        raise _bad(path, f"an array of {dtype} {shape}, not rows of integers")
    count = math.prod(shape)
    _check_size(path, size + count * dtype.itemsize, f"{shape[0]:,} rows of {shape[1]:,} tokens")
    return TokenFile(path, header, dtype, count, shape[1], pad)


# --- into a dataset --------------------------------------------------------------------------------------------------


def hash_files(found: TokenFiles) -> Generator[Event, None, dict[str, list[str]]]:
    """The SHA-256 of every file, by split."""
    total = sum(file.path.stat().st_size for files in found.files.values() for file in files)
    done = 0
    hashes: dict[str, list[str]] = {}
    for split, files in found.files.items():
        hashes[split] = []
        for file in files:
            hashes[split].append(sha256(file.path))
            done += file.path.stat().st_size
            yield Working("reading", done, total, "bytes")
    return hashes


def copy_tokens(
    found: TokenFiles, split: str, made: Tokenizer, shard: ShardWriter, hashes: list[str]
) -> Generator[Event, None, dict[str, int]]:
    """Write the tokens of a split as they are; returns what was counted. `hashes` are those of the files before."""
    tally = _Tally(made)
    total = sum(file.tokens for file in found.files[split])
    for file, expected in zip(found.files[split], hashes, strict=True):
        digest = hashlib.sha256()
        for ids in file.read(digest.update):
            _check_ids(ids, made, file.path)
            shard.write(ids)
            tally.add(ids)
            yield Working(f"copying {split}", shard.count, total, "tokens")
        if digest.hexdigest() != expected:
            raise _bad(file.path, "the file changed while it was read")
    return tally.counts() | {"tokens": shard.count}


def _check_ids(ids: Ids, made: Tokenizer, path: Path) -> None:
    for id in (ids.min(), ids.max()) if len(ids) else ():
        if not 0 <= id < made.size:
            what = f"a token {id} in it is none of the tokenizer's {made.size:,}"
            fix = "Type --tokenizer and the path of the tokenizer.json that made the tokens."
            raise SiliconError(what, where=str(path), fix=fix, kind="bad_data")


class _Tally:
    """Documents, characters and bytes of the text that tokens stand for, and how many of them are text at all."""

    def __init__(self, made: Tokenizer) -> None:
        self._made = made
        self._is_text = np.isin(np.arange(made.size), list(made.special_ids), invert=True)
        self._held = np.empty(0, dtype=np.uint32)
        self._documents = self._text = self._characters = self._bytes = 0

    def add(self, ids: Ids) -> None:
        """Count further tokens. A byte-level tokenizer's need no decoding; others' are decoded up to a text's end."""
        ends = np.flatnonzero(ids == self._made.eos)
        self._documents += len(ends)
        self._text += int(self._is_text[ids].sum())
        if self._made.is_byte_level:
            characters, size = self._made.measure(ids)
            self._characters += characters
            self._bytes += size
            return
        self._held = np.concatenate([self._held, ids])
        if len(ends) or len(self._held) > LONGEST_TEXT:
            rest = len(ids) - ends[-1] if len(ends) else 0
            self._decode(len(self._held) - rest)

    def _decode(self, count: int) -> None:
        ids, self._held = self._held[:count], self._held[count:]
        for document in np.split(ids, np.flatnonzero(ids == self._made.eos) + 1):
            text = self._made.decode(document.tolist())
            self._characters += len(text)
            self._bytes += len(text.encode())

    def counts(self) -> dict[str, int]:
        self._decode(len(self._held))
        counts = {"documents": max(1, self._documents), "learned_text": self._text}
        return counts | {"characters": self._characters, "bytes": self._bytes}
