"""Where text comes from: the built-in corpus, files, folders, the hub and tiny Shakespeare, as streams of text.

A dataset is a sequence of documents. A document, which may hold many texts, can be read again and again, piece by
piece, in memory that does not grow with its size: one pass counts it, the next one turns it into tokens.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import http.client
import os
import stat
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from siliconlm.data import builtin
from siliconlm.data.hub import HUB, fetch_dataset
from siliconlm.data.records import PARQUET, RECORD_SUFFIXES, read_texts
from siliconlm.data.tokenizer import Part
from siliconlm.data.utf8 import Watch, decoded
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Event, Notice, Working
from siliconlm.files import PIECE, home, sha256, write_file

BUILTIN = "builtin"
BUILTIN_SIZE = 1_000_000
BUILTIN_SEED = 1
SHAKESPEARE = "shakespeare"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_LIMIT = 16 << 20
TIMEOUT = 30

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".mdx", ".rst", ".adoc", ".org", ".tex")
HEAD = 64 << 10
MAX_CONTROL = 0.1
CONTROL = bytes(code for code in [*range(32), 127] if code not in b"\t\n\v\f\r")
# The longer mark first: UTF-32's little-endian mark begins with UTF-16's.
FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True, slots=True)
class Document:
    """A file, which holds one text or `records`, or the built-in corpus. `read` begins anew each time."""

    name: str
    size: int
    read: Callable[[int, Watch | None], Iterator[Part]]
    path: Path | None = None
    records: bool = False

    def parts(self, size: int = PIECE, watch: Watch | None = None) -> Iterator[Part]:
        """The texts in pieces, without a byte order mark, each with whether a text begins with it.

        Long texts come in pieces of about `size` bytes, empty ones as an empty piece. `watch` sees the file's bytes.
        """
        return self.read(size, watch)

    def pieces(self, size: int = PIECE) -> Iterator[str]:
        """The texts in pieces, one text after the other."""
        return (piece for _, piece in self.parts(size))

    def state(self) -> tuple[int, ...]:
        """What changes when the file does."""
        if self.path is None:
            return ()
        facts = self.path.stat()
        return facts.st_ino, facts.st_size, facts.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Source:
    """What one word on the command line stands for. `builtin` says that the text is generated."""

    name: str
    documents: tuple[Document, ...]
    builtin: bool = False


@dataclass(slots=True)
class _Tally:
    """What was left out on the way, so that nothing is left out in silence."""

    text_field: str | None = None
    records: int = 0
    empty: list[str] = field(default_factory=list)
    twice: int = 0
    marked: int = 0
    other: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)


def open_sources(words: list[str], field: str | None = None) -> Generator[Event, None, list[Source]]:
    """What each word stands for: `builtin`, `shakespeare`, hf://datasets/..., a file, a folder or a quoted pattern.

    `field` is the one that holds the text of a record. Yields Notices of what was left out, and Working while it
    downloads; returns the sources that hold text.
    """
    if not all(words) or not words:
        fix = f"Type: silicon prepare {BUILTIN}, or silicon prepare path/to/input.txt"
        raise SiliconError("no text was given", fix=fix, kind="missing_input")
    tally = _Tally(field)
    sources = []
    for word in words:
        sources.append((yield from _open_word(word, tally)))
    if not any(source.documents for source in sources):
        raise _nothing_left(words, tally)
    yield from _notices(tally)
    return [source for source in sources if source.documents]


def _open_word(word: str, tally: _Tally) -> Generator[Event, None, Source]:
    if word == BUILTIN:
        return Source(word, (builtin_document(),), builtin=True)
    if word == SHAKESPEARE:
        path = yield from download_shakespeare()
        return Source(word, tuple(_documents([path], tally)))
    if word.startswith(HUB):
        paths = yield from fetch_dataset(word)
        return Source(word, tuple(_documents(paths, tally)))
    path = Path(word).expanduser()
    if not os.path.lexists(path) and any(sign in word for sign in "*?["):
        paths = _matches(word)
    elif path.is_dir():
        paths = _walk(path, tally)
    else:
        _check_file(path, word)
        paths = [path]
    return Source(word, tuple(_documents(paths, tally)))


def builtin_document() -> Document:
    """The package's own corpus as one document."""
    return Document(BUILTIN, BUILTIN_SIZE, partial(_one_text, _builtin_bytes, BUILTIN))


@cache
def builtin_pieces() -> tuple[builtin.Piece, ...]:
    """The built-in corpus, kept once made: it is small, and making it is the slowest part of preparing it."""
    return tuple(builtin.pieces(size=BUILTIN_SIZE, seed=BUILTIN_SEED))


def _builtin_bytes(size: int) -> Iterator[bytes]:
    held = bytearray()
    for piece in builtin_pieces():
        held += piece.text.encode()
        if len(held) >= size:
            yield bytes(held)
            held.clear()
    yield bytes(held)


# --- files -----------------------------------------------------------------------------------------------------------


def _documents(paths: list[Path], tally: _Tally) -> Iterator[Document]:
    """The files among `paths` that hold text, each once however often it is named."""
    for path in paths:
        real = os.path.realpath(path)
        if real in tally.seen:
            tally.twice += 1
            continue
        tally.seen.add(real)
        document = _document(path, tally)
        if any(piece.strip() for piece in document.pieces(HEAD)):
            yield document
        else:
            tally.empty.append(str(path))


def _document(path: Path, tally: _Tally) -> Document:
    head = _head(path)
    if path.suffix.lower() != PARQUET:
        _check_head(head, path)
        tally.marked += head.startswith(codecs.BOM_UTF8)
    records = path.suffix.lower() in RECORD_SUFFIXES
    tally.records += records
    one = partial(_one_text, partial(_file_bytes, path), str(path))
    many = partial(_many_texts, path, tally.text_field)
    return Document(str(path), path.stat().st_size, many if records else one, path, records)


def _one_text(raw: Callable[[int], Iterator[bytes]], name: str, size: int, watch: Watch | None) -> Iterator[Part]:
    begins = True
    for piece in decoded(raw(size), name, watch):
        yield begins, piece
        begins = False


def _many_texts(path: Path, field: str | None, size: int, watch: Watch | None) -> Iterator[Part]:
    """A record is in memory whole, so that its text is one piece whatever `size` is."""
    return ((True, text) for text in read_texts(path, field, watch))


def _file_bytes(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(size):
            yield piece


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except PermissionError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SiliconError:
    fix = "Check its permissions (chmod u+r), or leave it out."
    return SiliconError(f"cannot read it: {error.strerror}", where=str(path), fix=fix, kind="missing_input")


def _check_file(path: Path, word: str) -> None:
    """An existing regular file passes; a pipe or a device would block or never end."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(path, word) from error
    except PermissionError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        fix = "Write the text to a file first, and give that file."
        raise SiliconError("not a regular file", where=str(path), fix=fix, kind="bad_data")


def _missing(path: Path, word: str) -> SiliconError:
    if not path.parent.is_dir():
        return SiliconError("no such folder", where=str(path.parent), fix="Check the path.", kind="missing_input")
    words = [BUILTIN, SHAKESPEARE] if path.name == word else []
    try:
        there = sorted(os.listdir(path.parent))
    except PermissionError:  # a folder may be passed through and yet not listed
        there = []
    close = nearest(path.name, [*there, *words])
    fix = close or f"Check the path, or train on the built-in corpus: silicon prepare {BUILTIN}"
    return SiliconError("no such file or folder", where=word, fix=fix, kind="missing_input")


def _check_head(head: bytes, path: Path) -> None:
    """Refuse what is not UTF-8 text while it can still be said why."""
    for mark, name in FOREIGN_MARKS:
        if head.startswith(mark):
            fix = f"Convert it first: iconv -f {name} -t UTF-8 IN.txt > OUT.txt"
            raise SiliconError(f"the text is {name}, not UTF-8", where=str(path), fix=fix, kind="bad_data")
    controls = len(head) - len(head.translate(None, CONTROL))
    zero = head.find(b"\0")
    if zero >= 0 or controls > MAX_CONTROL * len(head):
        why = f"a NUL byte at offset {zero}" if zero >= 0 else f"{controls / len(head):.0%} control characters"
        fix = "Give plain UTF-8 text; convert PDF, Word and archives first."
        raise SiliconError(f"not a text file: {why}", where=str(path), fix=fix, kind="bad_data")


def _matches(pattern: str) -> list[Path]:
    """The files a quoted pattern names, sorted. `**` goes into folders; hidden files are left out."""
    found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = [Path(name) for name in found if os.path.isfile(name)]
    if not paths:
        why = "only folders match the pattern" if found else "no file matches the pattern"
        fix = "Check it with: ls " + pattern
        raise SiliconError(why, where=pattern, fix=fix, kind="missing_input")
    return paths


def _walk(folder: Path, tally: _Tally) -> list[Path]:
    """The text files of a folder and the folders in it, sorted by name; hidden ones and links to folders left out."""
    found: list[Path] = []
    other: Counter[str] = Counter()
    for root, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in (*TEXT_SUFFIXES, *RECORD_SUFFIXES) and path.is_file():
                found.append(path)
            else:
                other[path.suffix] += 1
    if not found:
        raise _no_text(folder, other)
    tally.other += other
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _raise_unreadable(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise _unreadable(Path(str(error.filename)), error) from error
    raise error


def _no_text(folder: Path, other: Counter[str]) -> SiliconError:
    kinds = ", ".join(f"*{suffix}" for suffix in (*TEXT_SUFFIXES, *RECORD_SUFFIXES))
    suffixes = [suffix for suffix, _ in other.most_common() if suffix]
    fix = f"Looked for {kinds}."
    if suffixes:
        fix += f" For other text files give a pattern: silicon prepare '{folder}/**/*{suffixes[0]}'"
    return SiliconError("no text files in the folder", where=str(folder), fix=fix, kind="missing_input")


def _nothing_left(words: list[str], tally: _Tally) -> SiliconError:
    fix = "Give a file with text in it."
    if len(tally.empty) > 1:
        what = f"no text: all {len(tally.empty)} files are empty or hold only white space"
        return SiliconError(what, where=" ".join(words), fix=fix, kind="bad_data")
    path = tally.empty[0]
    holds = "no text in its records" if tally.records else "only white space"
    what = f"the file holds {holds}" if os.path.getsize(path) else "the file is empty"
    return SiliconError(what, where=path, fix=fix, kind="bad_data")


def _notices(tally: _Tally) -> Iterator[Notice]:
    if tally.empty:
        yield Notice(f"left out {_files(len(tally.empty))} without text (empty, or only white space): {tally.empty[0]}")
    if tally.twice:
        yield Notice(f"{_files(tally.twice)} named more than once: each was read once")
    if tally.marked:
        yield Notice(f"left out the byte order mark that {_files(tally.marked)} began with")
    if tally.text_field and not tally.records:
        yield Notice(f"--field {tally.text_field} was not used: no file of records was given", level="warning")
    if tally.other:
        suffixes = ", ".join(suffix or "no suffix" for suffix, _ in tally.other.most_common(5))
        yield Notice(f"left out {_files(tally.other.total())} of other kinds in the folder ({suffixes})")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


# --- tiny Shakespeare ------------------------------------------------------------------------------------------------


def download_shakespeare() -> Generator[Event, None, Path]:
    """The path of tiny Shakespeare, downloaded once, checked by its SHA-256 each time."""
    path = home() / "downloads" / "tinyshakespeare.txt"
    if path.is_file() and sha256(path) == SHAKESPEARE_SHA256:
        return path
    data = yield from _download(SHAKESPEARE_URL)
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        what = f"the download is not tiny Shakespeare: SHA-256 {found[:12]}..., not {SHAKESPEARE_SHA256[:12]}..."
        raise SiliconError(what, where=SHAKESPEARE_URL, fix=_instead(), kind="bad_data")
    write_file(path, data)
    return path


def _download(url: str) -> Generator[Event, None, bytes]:
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            while piece := answer.read(HEAD):
                data += piece
                if len(data) > DOWNLOAD_LIMIT:
                    break  # the hash will not match; do not fill the memory to find out
                yield Working("downloading tiny Shakespeare", len(data), total, "bytes")
    except (OSError, http.client.HTTPException) as error:
        raise _offline(url, error) from error
    if len(data) < total:
        raise _offline(url, EOFError(f"the connection ended after {len(data):,} of {total:,} bytes"))
    return bytes(data)


def _offline(url: str, error: Exception) -> SiliconError:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        why = f"the server answered {error.code}"
    else:
        reason = getattr(error, "reason", None) or error
        why = str(getattr(reason, "strerror", None) or reason)
    return SiliconError(f"cannot download tiny Shakespeare: {why}", where=url, fix=_instead(), kind="missing_input")


def _instead() -> str:
    return (
        "Give a file you have: silicon prepare path/to/input.txt, "
        f"or use the built-in corpus, which needs no network: silicon prepare {BUILTIN}"
    )
