"""Token files on disk: a header that says what they are, then little-endian tokens.

Read with pread: a file cut short under mmap kills Python, under pread it is an error that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from siliconlm.data.remake import remake_command
from siliconlm.errors import SiliconError
from siliconlm.files import sha256, sync

MAGIC = b"SILICON1\n"
HEADER = 4096
DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
LARGEST_READ = 1 << 30  # macOS refuses more than 2 GiB in one call

Tokens = np.ndarray[Any, np.dtype[np.int64]]


def dtype_for(vocabulary: int) -> str:
    """The name of the smallest dtype that holds every id of a vocabulary."""
    return "uint16" if vocabulary <= 65535 else "uint32"


class ShardWriter:
    """Writes a token file piece by piece. The header comes last, so an unfinished file is never taken for a whole one.

    After the block `count` and `sha256` say what was written.
    """

    def __init__(self, path: Path, dtype: str, tokenizer: str) -> None:
        self.path = path
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.count = 0
        self.largest = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> ShardWriter:
        self._file = open(self.path, "wb")
        self._file.write(bytes(HEADER))
        return self

    def write(self, tokens: np.ndarray[Any, Any]) -> None:
        """Append tokens of any integer dtype."""
        if not len(tokens):
            return
        kind = DTYPES[self.dtype]
        largest = int(tokens.max())
        assert int(tokens.min()) >= 0 and largest <= np.iinfo(kind).max, "a token does not fit the shard's dtype"
        data = np.ascontiguousarray(tokens, dtype=kind).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.count += len(tokens)
        self.largest = max(self.largest, largest)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            self._file.seek(0)
            self._file.write(self._header())
            self._file.flush()
            sync(self._file.fileno())

    def _header(self) -> bytes:
        facts = {"dtype": self.dtype, "count": self.count, "largest": self.largest}
        facts |= {"tokenizer": self.tokenizer, "sha256": self.sha256}
        line = MAGIC + json.dumps(facts).encode()
        return line.ljust(HEADER - 1) + b"\n"


@dataclass(frozen=True, slots=True)
class Shard:
    """A token file opened for reading; safe to read from many threads.

    `count` tokens, `tokenizer` the SHA-256 of the tokenizer.json they were made with, `sha256` that of the tokens.
    """

    path: Path
    dtype: str
    count: int
    largest: int
    tokenizer: str
    sha256: str
    _fd: int = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Open a token file; checks the header and the size, not yet the content (see `verify`)."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            _broken(path, "the file is missing", kind="missing_input")
        try:
            facts = _facts(os.pread(fd, HEADER, 0), path)
            _check_size(path, os.fstat(fd).st_size, facts)
            return cls(path=path, _fd=fd, **facts)
        except BaseException:
            os.close(fd)
            raise

    def vocab_fits(self, size: int) -> bool:
        """Whether every token is an id of a vocabulary of `size` tokens."""
        return self.largest < size

    def read(self, start: int, n: int) -> Tokens:
        """Tokens `start` to `start + n` as int64."""
        assert 0 <= start <= start + n <= self.count, "read outside the shard"
        kind = DTYPES[self.dtype]
        data = self._bytes(HEADER + start * kind.itemsize, n * kind.itemsize)
        tokens = np.frombuffer(data, dtype=kind).astype(np.int64)
        if n and int(tokens.max()) > self.largest:
            at = start + int(tokens.argmax())
            _broken(self.path, f"token {at:,} is {tokens.max()}, above the largest there can be ({self.largest})")
        return tokens

    def _bytes(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            part = os.pread(self._fd, min(length, LARGEST_READ), offset)
            if not part:
                _broken(self.path, f"the file ends early, at offset {offset:,}: it was cut short while in use")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def verify(self) -> None:
        """Read everything and compare it with the hash in the header."""
        facts = {"dtype": self.dtype, "count": self.count}
        _check_size(self.path, os.fstat(self._fd).st_size, facts)
        if sha256(self.path, HEADER) != self.sha256:
            _broken(self.path, "the tokens are not those that were written (SHA-256 differs)")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _facts(header: bytes, path: Path) -> dict[str, Any]:
    """The header's record, every entry of the right type."""
    if not header.startswith(MAGIC):
        _broken(path, "not a SiliconLM token file, or one that was not finished")
    try:
        facts = json.loads(header[len(MAGIC) :])
    except ValueError:
        _broken(path, "the header is damaged")
    types = {"dtype": str, "count": int, "largest": int, "tokenizer": str, "sha256": str}
    if not isinstance(facts, dict) or any(type(facts.get(name)) is not kind for name, kind in types.items()):
        _broken(path, "the header is damaged")
    if facts["dtype"] not in DTYPES or facts["count"] < 0 or facts["largest"] < 0:
        _broken(path, "the header is damaged")
    return {name: facts[name] for name in types}


def _check_size(path: Path, size: int, facts: dict[str, Any]) -> None:
    expected = HEADER + facts["count"] * DTYPES[facts["dtype"]].itemsize
    if size != expected:
        _broken(path, f"{size:,} bytes, but {expected:,} belong there for {facts['count']:,} tokens")


def _broken(path: Path, why: str, kind: str = "bad_data") -> NoReturn:
    fix = f"Make the dataset again: {remake_command(path.parent)}"
    raise SiliconError(f"damaged token file: {why}", where=str(path), fix=fix, kind=kind)
