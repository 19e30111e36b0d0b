"""Files of records: JSON Lines, JSON and Parquet, read one record at a time however large the file is."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from siliconlm.data.utf8 import Watch, decoded
from siliconlm.errors import SiliconError, nearest
from siliconlm.files import PIECE

PARQUET = ".parquet"
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", PARQUET)
LONGEST = 64 << 20  # of a record, in bytes or characters: a text this long belongs in a file of its own
ROWS = 128  # of a Parquet file read at once
WHITE = " \t\n\r"  # between values in JSON
SPACE = re.compile(f"[{WHITE}]*")
LOOKAHEAD = len("1e+")  # what ends in these may yet go on to be another number
DECODER = json.JSONDecoder()
TEXT = "text"  # the field that holds a record's text where none is named
CHAT_KEYS: tuple[set[str], ...] = (
    {"messages"},
    {"conversations"},
    {"instruction", "output"},
    {"prompt", "completion"},
    {"prompt", "replies"},
)


def read_records(path: Path, watch: Watch | None = None) -> Iterator[tuple[str, Any]]:
    """Each record of a .jsonl, .ndjson, .json or .parquet file after the place it stands: `chat.jsonl line 3`.

    A record is any JSON value; of Parquet, a dict of the row. `watch` sees the bytes of the file. What cannot be read
    is a SiliconError that names the place.
    """
    suffix = path.suffix.lower()
    if suffix == PARQUET:
        return _rows(path, watch)
    return _items(path, watch) if suffix == ".json" else _lines(path, watch)


def _bytes(path: Path, watch: Watch | None) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            if watch:
                watch(piece)
            yield piece


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _lines(path: Path, watch: Watch | None) -> Iterator[tuple[str, Any]]:
    """Lines of white space hold no record, but count as lines."""
    name = str(path)  # writing a path out takes longer than parsing a short record
    for number, line in enumerate(_split(path, watch), start=1):
        if line and not line.isspace():
            place = f"{name} line {number}"
            yield place, _parsed(line, place)


def _split(path: Path, watch: Watch | None) -> Iterator[bytes]:
    """The lines of a file, without a byte order mark."""
    rest = b""
    complete = 0
    for piece in _bytes(path, watch):
        *lines, rest = (rest + piece).split(b"\n")
        if not complete and lines:
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        yield from lines
        complete += len(lines)
        if len(rest) > LONGEST:
            raise _too_long(f"{path} line {complete + 1}")
    yield rest if complete else rest.removeprefix(codecs.BOM_UTF8)


def _parsed(line: bytes, place: str) -> Any:
    try:
        text = line.decode().strip(WHITE)
        value, end = DECODER.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value
    except UnicodeDecodeError as error:
        what = f"not valid UTF-8: byte 0x{line[error.start]:02x} at offset {error.start:,} of the line"
        raise SiliconError(what, where=place, fix="Write the file in UTF-8.", kind="bad_data") from error
    except (ValueError, RecursionError) as error:
        raise _not_json(error, place) from error


def _too_long(place: str) -> SiliconError:
    fix = "Give a text this long as a text file of its own."
    return SiliconError(f"a record of more than {LONGEST >> 20} MiB", where=place, fix=fix, kind="bad_data")


def _not_json(error: ValueError | RecursionError, place: str, before: int = 0) -> SiliconError:
    """`before` characters stand before the text that was parsed."""
    if isinstance(error, RecursionError):
        why = "nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        what = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        why = f"{what} at character {before + error.pos + 1:,}"
    else:
        why = f"an integer of more than {sys.get_int_max_str_digits():,} digits"
    return SiliconError(f"not JSON: {why}", where=place, fix="Mend it or take it out.", kind="bad_data")


# --- JSON ------------------------------------------------------------------------------------------------------------


def _items(path: Path, watch: Watch | None) -> Iterator[tuple[str, Any]]:
    """The elements of an array; without one the values one after the other, which may be a single one."""
    values = _Values(decoded(_bytes(path, watch), str(path)))
    in_array = values.skip("[")
    name, number = str(path), 0
    while not (_array_ends(values, number, path) if in_array else values.peek() == ""):
        number += 1
        place = f"{name} item {number}"
        yield place, values.take(place)


def _array_ends(values: _Values, number: int, path: Path) -> bool:
    """Whether the array ends after its element `number`; if not, the next one stands first."""
    if values.skip("]"):
        if values.peek():
            fix = "Give one array, or a .jsonl file with a record on each line."
            raise SiliconError("more text after the end of the array", where=str(path), fix=fix, kind="bad_data")
        return True
    if number and not values.skip(","):
        why = "no comma after it" if values.peek() else "the file ends in the middle of the array"
        fix = "Mend the file, or fetch it again."
        raise SiliconError(f"not JSON: {why}", where=f"{path} item {number}", fix=fix, kind="bad_data")
    return False


class _Values:
    """JSON values out of text that comes in pieces, with about as much of it in memory as the longest value takes."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._at = 0
        self._before = 0  # characters that are no longer held

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, sign: str) -> bool:
        """Pass over `sign` where it comes next."""
        found = self.peek() == sign
        self._at += found
        return found

    def take(self, place: str) -> Any:
        """The next value. One that cannot be parsed may go on in the next piece."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if end + LOOKAHEAD <= len(self._text) or not self._more():
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise _not_json(error, place, self._before) from error
            if len(self._text) > LONGEST:
                raise _too_long(place)

    def _more(self) -> bool:
        """Hold twice as much or more, so that trying a long value again and again is no more work than parsing it."""
        rest = self._text[self._at :]
        parts = []
        wanted = max(1, len(rest))
        while wanted > 0 and (piece := next(self._pieces, "")):
            parts.append(piece)
            wanted -= len(piece)
        if parts:
            self._before += self._at
            self._text, self._at = "".join([rest, *parts]), 0
        return bool(parts)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _rows(path: Path, watch: Watch | None, columns: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The rows as dicts, of `columns` or of all."""
    if watch:
        for _ in _bytes(path, watch):
            pass
    with _parquet(path) as file, _arrow_errors(path):
        name, number = str(path), 0
        for batch in file.iter_batches(batch_size=ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{name} row {number}", row


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """An open pyarrow.parquet.ParquetFile."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        fix = "Type: pip install 'siliconlm[data]'"
        what = "Parquet files need pyarrow, which is not installed"
        raise SiliconError(what, where=str(path), fix=fix, kind="bad_environment") from error
    with _arrow_errors(path):
        file = ParquetFile(path, buffer_size=PIECE, pre_buffer=False)  # else it reads the whole file into memory
    with file:
        yield file


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    from pyarrow.lib import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        fix = "Is the file whole? Fetch it again."
        raise SiliconError(
            f"not a readable Parquet file: {first}", where=str(path), fix=fix, kind="bad_data"
        ) from error


# --- texts -----------------------------------------------------------------------------------------------------------


def read_texts(path: Path, field: str | None = None, watch: Watch | None = None) -> Iterator[str]:
    """The text of each record: a string, or what stands in the field `text`, or in the one named.

    A text of white space alone, or null in its place, comes as an empty one.
    """
    if path.suffix.lower() == PARQUET:
        _check_columns(path, field)
        records = _rows(path, watch, [field or TEXT])
    else:
        records = read_records(path, watch)
    for number, (place, record) in enumerate(records):
        if not (number or field) and looks_like_chat(record):
            raise _conversations(path, place)
        text = record if isinstance(record, str) else _field(record, field or TEXT, place)
        if not text or text.isspace():
            yield ""
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"half a surrogate pair, \\u{ord(text[error.start]):x}, stands in the text"
            raise SiliconError(what, where=place, fix="Mend it or take it out.", kind="bad_data") from error
        yield text


def _field(record: Any, field: str, place: str) -> str:
    if not isinstance(record, dict):
        fix = f'Give records such as {{"{field}": "To be, or not to be"}}, or strings.'
        raise SiliconError(f"{_kind(record)}, not a record with text", where=place, fix=fix, kind="bad_data")
    if field not in record:
        raise _no_field("field", field, list(record), place)
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        others = [name for name, value in record.items() if isinstance(value, str)]
        fix = f"Type --field {others[0]}" if others else "Give a field that holds text: --field NAME"
        raise SiliconError(f"field `{field}` is {_kind(text)}, not text", where=place, fix=fix, kind="bad_data")
    return text


def _check_columns(path: Path, field: str | None) -> None:
    with _parquet(path) as file:
        names = file.schema_arrow.names
    if not field and looks_like_chat(dict.fromkeys(names)):
        raise _conversations(path, str(path))
    if (field or TEXT) not in names:
        raise _no_field("column", field or TEXT, names, str(path))


def _no_field(kind: str, field: str, names: list[str], place: str) -> SiliconError:
    there = ", ".join(names[:20]) or "none"
    close = next((name for name in names if nearest(field, [name])), "")
    fix = f"Type --field {close}" if close else "Name the one that holds the text: --field NAME"
    what = f"no {kind} `{field}`; there are: {there}" + (", ..." if len(names) > 20 else "")
    return SiliconError(what, where=place, fix=fix, kind="bad_data")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "true or false", int: "a number"}
    return kinds.get(type(value), "null" if value is None else "a number")


# --- conversations ---------------------------------------------------------------------------------------------------


def looks_like_chat(record: Any) -> bool:
    """Whether a record holds a conversation, or a prompt and its answer, rather than a text."""
    if isinstance(record, list):
        return bool(record) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in record)
    return isinstance(record, dict) and any(keys <= record.keys() for keys in CHAT_KEYS)


def _conversations(path: Path, place: str) -> SiliconError:
    fix = f"Type: silicon finetune --data {path}, or read one field as plain text: --field NAME"
    return SiliconError("these are conversations, not texts", where=place, fix=fix, kind="bad_data")
