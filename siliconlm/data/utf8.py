"""UTF-8 bytes that come in pieces, as text."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterator

from siliconlm.errors import SiliconError

Watch = Callable[[bytes], object]  # sees the bytes of a file as they are read


def decoded(raw: Iterator[bytes], name: str = "", watch: Watch | None = None) -> Generator[str, None, None]:
    """UTF-8 bytes in pieces of any size as text in pieces; characters across a border come out whole.

    Strips one byte order mark. A bad byte is an error that says at which offset of the file it stands.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # bytes taken in before this piece
    fresh = True
    for piece in raw:
        if watch:
            watch(piece)
        text = _decode(decoder, piece, offset, name)
        offset += len(piece)
        if fresh and text:
            fresh = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text
    _decode(decoder, b"", offset, name, final=True)


def _decode(decoder: codecs.IncrementalDecoder, piece: bytes, offset: int, name: str, final: bool = False) -> str:
    begun = len(decoder.getstate()[0])
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        at = offset - begun + error.start
        bad = error.object[error.start : error.start + 1].hex()
        what = f"not valid UTF-8: byte 0x{bad} at offset {at:,}"
        fix = "Convert it first, for example: iconv -f WINDOWS-1252 -t UTF-8 IN.txt > OUT.txt"
        raise SiliconError(what, where=name, fix=fix, kind="bad_data") from error
