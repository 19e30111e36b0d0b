"""Tokenizers: every one is a Hugging Face tokenizer.json, ours are all byte-level BPE.

Byte and character tokenizers are byte-level BPE too, with no merges or with only those that make characters. So one
kind of file serves training, transformers, llama.cpp and mlx alike.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from siliconlm.errors import SiliconError, nearest

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
# Qwen2's pattern, to the letter: llama.cpp and Ollama know a pre-tokenizer by the hash of this string.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|im_end|>")
KINDS = ("byte", "char", "bpe")
SMALLEST_BPE = len(SPECIALS) + 256
MAX_FILE = 64 << 20


def _byte_symbols() -> tuple[str, ...]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else the next free one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (code for code in range(256) if code not in printable)
    stand_in = {code: 256 + index for index, code in enumerate(others)}
    return tuple(chr(stand_in.get(code, code)) for code in range(256))


SYMBOLS = _byte_symbols()
BYTES = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}

Part = tuple[bool, str]  # of a text: whether it begins with this, and what it says


class Stream(Protocol):
    """Turns ids into text one at a time, never giving out half a character."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer.json. `kind` is byte, char, bpe or a file name, `eos` the id that ends (and begins) a text."""

    inner: tokenizers.Tokenizer
    text: str
    kind: str
    size: int
    eos: int
    special_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """The ids of a text. A special token's name in it is plain text, so no text can forge one."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of many texts, on all cores."""
        with _rust("cannot encode this text", self.kind):
            encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_parts(self, parts: list[Part]) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """The ids of many parts in a row, with `eos` before each that begins a text."""
        ids, lengths = self._flat([part for _, part in parts])
        starts = np.cumsum([0, *lengths[:-1]])
        return np.insert(ids, starts[[begins for begins, _ in parts]], self.eos)

    def _flat(self, texts: list[str]) -> tuple[np.ndarray[Any, np.dtype[np.uint32]], list[int]]:
        """The ids of all texts in a row, and how many each has. Where a token is a byte this is one addition."""
        if self.is_bytes:
            data = [text.encode() for text in texts]
            return np.frombuffer(b"".join(data), dtype=np.uint8) + np.uint32(len(SPECIALS)), list(map(len, data))
        ids = self.encode_batch(texts)
        return np.fromiter(chain.from_iterable(ids), dtype=np.uint32), list(map(len, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens; bytes that make no character come out as U+FFFD."""
        with _rust("cannot decode these tokens", self.kind):
            return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> Stream:
        """A decoder for ids that arrive one by one."""
        if self.is_byte_level:
            return _ByteStream(self)
        return _WindowStream(self)

    def missing(self, text: str) -> list[str]:
        """The characters of a text that this tokenizer loses, sorted."""
        characters = sorted(set(text))
        whole = [character for character in characters if not "\ud800" <= character <= "\udfff"]
        lost = {char for char, ids in zip(whole, self.encode_batch(whole), strict=True) if char not in self.decode(ids)}
        return [character for character in characters if character in lost or character not in whole]

    def bytes_of(self, id: int) -> bytes:
        """The bytes a token of a byte-level tokenizer stands for; none for special tokens and unknown ids."""
        token = None if id in self.special_ids else self.inner.id_to_token(id)
        if token is None:
            return b""
        if all(symbol in BYTES for symbol in token):
            return bytes(BYTES[symbol] for symbol in token)
        return token.encode()

    def json(self) -> str:
        """The text of tokenizer.json."""
        return self.text

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file that `json` makes."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def name_of(self, id: int) -> str:
        """A token as its vocabulary writes it."""
        return str(self.inner.id_to_token(id))

    @cached_property
    def special_names(self) -> dict[str, int]:
        """Special tokens' ids by name."""
        return {self.name_of(id): id for id in self.special_ids}

    def measure(self, ids: np.ndarray[Any, np.dtype[Any]]) -> tuple[int, int]:
        """The characters and UTF-8 bytes that tokens of a byte-level tokenizer stand for."""
        characters, sizes = self._sizes
        return int(characters[ids].sum()), int(sizes[ids].sum())

    @cached_property
    def _sizes(self) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
        """For each id the characters that begin in its bytes, and how many bytes there are."""
        data = [self.bytes_of(id) for id in range(self.size)]
        characters = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in data]
        return np.array(characters), np.array([len(piece) for piece in data])

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for bytes of its own."""
        return isinstance(self.inner.decoder, decoders.ByteLevel)

    @cached_property
    def is_bytes(self) -> bool:
        """Whether a token is a byte, with nothing merged."""
        return self.text == byte_tokenizer().text


class _ByteStream:
    """For byte-level tokenizers: a byte that cannot go on to a character becomes U+FFFD at once, as in `decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(self._tokenizer.bytes_of(id))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _WindowStream:
    """For every other decoder: what a new id adds is the text of the latest ids with it, less their text without it.

    The latest ids reach back one finished piece, for decoders that treat the first token in their own way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # how many of these ids have been given out

    def push(self, id: int) -> str:
        self._ids.append(id)
        fresh = self._fresh()
        if not fresh or fresh.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return fresh

    def flush(self) -> str:
        fresh = self._fresh()
        self._ids, self._known = [], 0
        return fresh

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._known])
        return self._tokenizer.decode(self._ids)[len(before) :]


# --- making one ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def byte_tokenizer() -> Tokenizer:
    """A token for each byte: any text, the smallest vocabulary."""
    return _ours("byte", [*SPECIALS, *SYMBOLS], [])


def char_tokenizer(alphabet: Iterable[str]) -> Tokenizer:
    """A token for each character of `alphabet`; other characters are lost (see `missing`)."""
    tokens, merges = _spelled(sorted(set(alphabet)))
    return _ours("char", [*SPECIALS, *tokens], merges)


def numbered_char_tokenizer(characters: list[str]) -> Tokenizer:
    """A token for each character, whose id is its place in the list. Everything else has the ids after those."""
    tokens, merges = _spelled(characters)
    whole = ["".join(SYMBOLS[byte] for byte in character.encode()) for character in characters]
    return _ours("char", dict.fromkeys([*whole, *tokens, *SPECIALS]), merges)


def _spelled(characters: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens and merges that make characters.

    A character outside ASCII is merged from its bytes. A merge begins with the lead byte of a character, so it can
    never reach across two, and the pieces on the way are tokens as well.
    """
    tokens: dict[str, None] = {}
    merges: dict[tuple[str, str], None] = {}
    for character in characters:
        made = ""
        for symbol in (SYMBOLS[byte] for byte in character.encode()):
            tokens[symbol] = None
            if made:
                merges[made, symbol] = None
            made += symbol
            tokens[made] = None
    return list(tokens), list(merges)


def bpe_tokenizer(chunks: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learned from `chunks` of text. May be smaller than asked for where the text has too few pairs."""
    check_vocab_size(vocab_size)
    inner = _dress(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=_specials(),
        initial_alphabet=list(SYMBOLS),
        show_progress=False,
    )
    inner.train_from_iterator(chunks, trainer)
    return _wrap(inner, inner.to_str(), "bpe")


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a BPE vocabulary without room for what comes first."""
    if vocab_size < SMALLEST_BPE:
        what = f"vocab_size {vocab_size} is too small: {len(SPECIALS)} special tokens and 256 bytes come first"
        raise SiliconError(what, fix=f"Type --vocab-size {SMALLEST_BPE} or more")


def _ours(kind: str, tokens: Iterable[str], merges: list[tuple[str, str]]) -> Tokenizer:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    inner = _dress(models.BPE(vocab=vocabulary, merges=merges))
    inner.add_special_tokens(_specials())
    return _wrap(inner, inner.to_str(), kind)


def _specials() -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in SPECIALS]


def _dress(model: models.Model) -> tokenizers.Tokenizer:
    """Everything around the model that transformers, llama.cpp and mlx expect of a Qwen2 tokenizer."""
    inner = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, symbols])
    inner.decoder = decoders.ByteLevel()
    return inner


def _wrap(inner: tokenizers.Tokenizer, text: str, kind: str) -> Tokenizer:
    inner.encode_special_tokens = True
    vocabulary = inner.get_vocab(with_added_tokens=True)
    _check_ids(vocabulary, kind)
    special = frozenset(id for id, token in inner.get_added_tokens_decoder().items() if token.special)
    return Tokenizer(inner, text, kind, len(vocabulary), _end(vocabulary, kind), special)


def _end(vocabulary: dict[str, int], where: str) -> int:
    for name in ENDS:
        if name in vocabulary:
            return vocabulary[name]
    what = "the tokenizer has no end-of-text token; looked for " + ", ".join(ENDS)
    raise SiliconError(what, where=where, fix="Use a tokenizer that has one.", kind="bad_data")


# --- opening one -----------------------------------------------------------------------------------------------------


def open_tokenizer(path: Path, kind: str = "") -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder. `kind` defaults to the file's name."""
    if path.is_dir():
        path = path / "tokenizer.json"
    text = _read(path)
    _check_json(text, path)
    with _rust("the tokenizers library cannot load it", str(path)):
        inner = tokenizers.Tokenizer.from_str(text)
    if text == byte_tokenizer().text:
        kind = "byte"
    try:
        return _wrap(inner, text, kind or path.name)
    except SiliconError as error:
        error.where = str(path)
        raise


def _read(path: Path) -> str:
    if not path.is_file():
        close = nearest(str(path), KINDS)
        fix = close or f"Give the path of a tokenizer.json, or one of: {', '.join(KINDS)}"
        raise SiliconError("no such tokenizer", where=str(path), fix=fix, kind="missing_input")
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise _refused(path, f"larger than {MAX_FILE >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _refused(path, f"not UTF-8 at offset {error.start}") from error


def _check_json(text: str, path: Path) -> None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"not JSON: {error}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise _refused(path, "no `model` in it")
    for setting in ("padding", "truncation"):
        if content.get(setting) is not None:
            raise _refused(path, f"{setting} is set, which would change the text; set it to null")


def _check_ids(vocabulary: dict[str, int], where: str) -> None:
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        what = f"the ids of its {len(vocabulary)} tokens are not 0 to {len(vocabulary) - 1}, each once"
        raise _refused(Path(where), what)


def _refused(path: Path, why: str) -> SiliconError:
    fix = "Give a tokenizer.json that transformers can load."
    return SiliconError(f"not a usable tokenizer.json: {why}", where=str(path), fix=fix, kind="bad_data")


@contextmanager
def _rust(what: str, where: str) -> Iterator[None]:
    """The library reports everything as a bare Exception or, where it panics, as a BaseException of its own."""
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, TypeError, ValueError) and type(error).__name__ != "PanicException":
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "Is it UTF-8 text, and the tokenizer whole?"
        raise SiliconError(f"{what}: {first}", where=where, fix=fix, kind="bad_data") from error


# --- cutting text ----------------------------------------------------------------------------------------------------

CHUNK = 64 << 10
LONGEST = 1 << 18
# Places where one token surely ends and another begins under PATTERN: before a space that follows a word or sign, and
# after a line end that no white space follows. Python's \s holds everything that the tokenizers' \s does.
BORDER = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=\S)")


def chunks(parts: Iterable[Part], size: int = CHUNK, longest: int = LONGEST) -> Iterator[Part]:
    """Texts cut so that the tokens of the chunks are those of each whole text, whatever the parts it comes in.

    A chunk ends at the first certain border after `size` characters; text without one is cut hard at `longest`.
    """
    rest, begins = "", False
    for fresh, part in parts:
        if fresh:
            if rest:
                yield begins, rest
            rest, begins = "", True
        rest += part
        start = 0
        while len(rest) - start > size:
            end = _border(rest, start, size, longest)
            if not end:
                break
            yield begins, rest[start:end]
            start, begins = end, False
        rest = rest[start:]
    if rest:
        yield begins, rest


def _border(text: str, start: int, size: int, longest: int) -> int:
    """Where the chunk from `start` on ends, or 0 where more text is needed to tell."""
    found = BORDER.search(text, start + size, min(len(text), start + longest))
    if found:
        return found.start()
    return start + longest if len(text) - start > longest else 0
