"""Every tokenizer is a tokenizer.json; ours lose nothing, forge nothing and do not care where text is cut."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from siliconlm.data import tokenizer as module
from siliconlm.data.tokenizer import (
    END_OF_TEXT,
    PATTERN,
    SPECIALS,
    Tokenizer,
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    chunks,
    open_tokenizer,
)
from siliconlm.errors import SiliconError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"
VERSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 40
ACCENTS = "naïve façade — “Schöne Grüße” 世界 🙂 "
BPE = bpe_tokenizer([VERSE, ACCENTS * 20], 400)
CHAR = char_tokenizer(VERSE + ACCENTS)
# Text with many borders, white space of every kind and characters of one to four bytes.
TEXT = st.text(st.sampled_from(list("ab'sT1 \t\n\r.-é世🙂\x1c\x85\u2028\u3000\u0301")) | st.characters(codec="utf-8"))


def test_the_pattern_is_qwen2s_to_the_letter() -> None:
    digest = hashlib.sha256(PATTERN.encode()).hexdigest()
    assert digest == "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e"


@pytest.mark.parametrize("made", [byte_tokenizer(), CHAR, BPE], ids=lambda made: made.kind)
def test_the_file_is_what_other_programs_expect(made: Tokenizer) -> None:
    content = json.loads(made.json())
    assert content["normalizer"] is content["post_processor"] is content["padding"] is content["truncation"] is None
    split, symbols = content["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": PATTERN} and split["behavior"] == "Isolated" and split["invert"] is False
    assert symbols["type"] == "ByteLevel" and not symbols["add_prefix_space"] and not symbols["use_regex"]
    assert content["decoder"]["type"] == "ByteLevel"
    assert content["model"]["type"] == "BPE" and content["model"]["ignore_merges"] is False
    added = [
        (token["id"], token["content"], token["special"], token["normalized"]) for token in content["added_tokens"]
    ]
    assert added == [(id, name, True, False) for id, name in enumerate(SPECIALS)]
    assert sorted(content["model"]["vocab"].values()) == list(range(made.size))
    assert made.eos == 0 and made.special_ids == {0, 1, 2}
    assert made.inner.token_to_id("<|im_end|>") == 2


def test_byte_ids_are_the_bytes_after_the_special_tokens() -> None:
    made = byte_tokenizer()
    assert made.size == 259 and made.kind == "byte"
    text = "".join(map(chr, range(0x250))) + ACCENTS
    assert made.encode(text) == [byte + 3 for byte in text.encode()]
    assert set(module.SYMBOLS) == set(pre_tokenizers.ByteLevel.alphabet())


@given(TEXT)
def test_byte_and_bpe_lose_nothing(text: str) -> None:
    for made in (byte_tokenizer(), BPE):
        ids = made.encode(text)
        assert made.decode(ids) == text and made.missing(text) == []


@given(st.lists(st.tuples(st.booleans(), TEXT), min_size=1))
def test_the_end_of_text_stands_before_each_text(parts: list[tuple[bool, str]]) -> None:
    for made in (byte_tokenizer(), BPE):
        expected = [id for begins, text in parts for id in [made.eos] * begins + made.encode(text)]
        assert made.encode_parts(parts).tolist() == expected


@given(st.text(st.sampled_from(sorted(set(VERSE + ACCENTS)))))
def test_a_character_is_a_token(text: str) -> None:
    assert len(CHAR.encode(text)) == len(text)
    assert CHAR.decode(CHAR.encode(text)) == text and CHAR.missing(text) == []


@given(st.sets(st.characters(codec="utf-8"), min_size=1), st.data())
def test_a_character_is_a_token_in_any_alphabet(alphabet: set[str], data: st.DataObject) -> None:
    made = char_tokenizer(alphabet)
    text = data.draw(st.text(st.sampled_from(sorted(alphabet))))
    assert len(made.encode(text)) == len(text) and made.decode(made.encode(text)) == text


def test_characters_outside_the_alphabet_are_told() -> None:
    made = char_tokenizer("abcé世")
    assert made.missing("a-b*c é丗") == [" ", "*", "-", "丗"]
    assert made.missing("\ud800a") == ["\ud800"]


def test_the_same_text_gives_the_same_vocabulary() -> None:
    assert bpe_tokenizer([VERSE, ACCENTS * 20], 400).sha256 == BPE.sha256
    assert BPE.sha256 == hashlib.sha256(BPE.json().encode()).hexdigest()
    assert BPE.size <= 400 and len(BPE.encode(VERSE)) < len(VERSE) / 2


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(SiliconError, match="too small"):
        bpe_tokenizer([VERSE], 258)
    assert bpe_tokenizer([VERSE], 259).size == 259


@given(st.lists(st.sampled_from([*SPECIALS, "a", " ", "<|", "|>"])).map("".join))
def test_no_text_can_forge_a_special_token(text: str) -> None:
    for made in (byte_tokenizer(), BPE):
        assert not made.special_ids & set(made.encode(text))
        assert made.decode([made.eos, *made.encode(text), 1, 2]) == text


# --- cutting ---------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """What the pattern makes of a text, whatever is merged in it afterwards."""
    assert BPE.inner.pre_tokenizer
    return [word for word, _ in BPE.inner.pre_tokenizer.pre_tokenize_str(text)]


def cut(pieces: list[str], size: int, longest: int) -> list[str]:
    """The chunks of one text that comes in pieces."""
    found = list(chunks([(number == 0, piece) for number, piece in enumerate(pieces)], size, longest))
    assert [begins for begins, _ in found] == [number == 0 for number in range(len(found))]
    return [chunk for _, chunk in found]


@settings(max_examples=300)
@given(TEXT, st.integers(1, 8))
def test_cut_text_has_the_tokens_of_the_whole(text: str, size: int) -> None:
    parts = cut([text], size, 10**6)
    assert "".join(parts) == text
    assert [word for part in parts for word in words(part)] == words(text)
    assert [id for ids in BPE.encode_batch(parts) for id in ids] == BPE.encode(text)


@given(TEXT, st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 30)))
def test_cuts_do_not_depend_on_the_pieces(text: str, size: int, extra: int, cuts: list[int]) -> None:
    whole = cut([text], size, size + extra)
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert cut(pieces, size, size + extra) == whole
    assert all(len(part) <= size + extra for part in whole)


@given(st.lists(TEXT), st.integers(1, 40), st.integers(1, 40))
def test_no_chunk_holds_two_texts(texts: list[str], size: int, extra: int) -> None:
    expected = [(number == 0, chunk) for text in texts for number, chunk in enumerate(cut([text], size, size + extra))]
    assert list(chunks([(True, text) for text in texts], size, size + extra)) == expected


@pytest.mark.skipif(not REAL.exists(), reason="needs tiny Shakespeare beside the repository")
def test_real_text() -> None:
    text = REAL.read_text()
    assert char_tokenizer(text).size == 65 + 3
    parts = cut([text], 1000, 1 << 18)
    assert len(parts) > 1000 and [id for ids in BPE.encode_batch(parts) for id in ids] == BPE.encode(text)


# --- one id at a time ------------------------------------------------------------------------------------------------


def streamed(made: Tokenizer, ids: list[int]) -> str:
    stream = made.stream()
    return "".join(map(stream.push, ids)) + stream.flush()


@given(TEXT)
def test_streamed_text_is_the_text(text: str) -> None:
    for made in (byte_tokenizer(), BPE):
        stream = made.stream()
        shown = ""
        for id in made.encode(text):
            shown += stream.push(id)
            assert text.startswith(shown)
        assert shown + stream.flush() == text


@given(st.lists(st.integers(0, 258)))
def test_streamed_rubbish_is_what_decode_makes_of_it(ids: list[int]) -> None:
    assert streamed(byte_tokenizer(), ids) == byte_tokenizer().decode(ids)


def test_half_a_character_waits_and_is_flushed_as_a_mark() -> None:
    made = byte_tokenizer()
    stream = made.stream()
    ids = made.encode("a🙂")
    assert [stream.push(id) for id in ids] == ["a", "", "", "", "🙂"]
    assert stream.push(ids[1]) == "" and stream.flush() == "\ufffd" and stream.flush() == ""


def words_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of another family: words with a marker, the first one's space left out, bytes as a way out."""
    pieces = [END_OF_TEXT, "<unk>", "▁to", "▁be", "▁or", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return inner


def test_other_decoders_stream_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(words_tokenizer().to_str())
    made = open_tokenizer(tmp_path)
    ids = [2, 3, *(5 + byte for byte in "é🙂".encode()), 4, 2]
    assert streamed(made, ids) == made.decode(ids) == "to beé🙂 or to"
    assert streamed(made, ids[:3]) == made.decode(ids[:3]) == "to be\ufffd"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [byte_tokenizer(), CHAR, BPE], ids=lambda made: made.kind)
def test_a_saved_tokenizer_opens_as_it_was(made: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(made.json())
    again = open_tokenizer(tmp_path / "tokenizer.json", made.kind)
    assert (again.sha256, again.size, again.eos, again.kind) == (made.sha256, made.size, made.eos, made.kind)
    assert again.is_bytes == (made.kind == "byte")
    assert again.encode(VERSE) == made.encode(VERSE)
    assert open_tokenizer(tmp_path).kind == ("byte" if made.kind == "byte" else "tokenizer.json")


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(BPE.json()) | changes)


def with_model(**changes: Any) -> str:
    return changed(model=json.loads(BPE.json())["model"] | changes)


VOCABULARY = json.loads(BPE.json())["model"]["vocab"]
HOSTILE = {
    "empty": "",
    "not json": "{",
    "a list": "[]",
    "no model": "{}",
    "deep": "[" * 100_000,
    "pickle": "\x80\x04",
    "nan": "NaN",
    "padding": changed(padding={"strategy": "BatchLongest", "direction": "Right", "pad_id": 0, "pad_token": "x"}),
    "truncation": changed(truncation={"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    "a hole": with_model(vocab={token: id + (id > 50) for token, id in VOCABULARY.items()}, merges=[]),
    "a double": with_model(vocab={token: min(id, 100) for token, id in VOCABULARY.items()}, merges=[]),
    "negative": with_model(vocab=VOCABULARY | {"!": -1}),
    "huge id": with_model(vocab=VOCABULARY | {"!": 2**31}, merges=[]),
    "unknown merge": with_model(merges=[["nosuch", "token"]]),
    "merge of one": with_model(merges=["x"]),
    "bad pattern": changed(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "unknown decoder": changed(decoder={"type": "NoSuch"}),
    "model is text": changed(model="BPE"),
    "no end": changed(added_tokens=[], model={"type": "BPE", "vocab": {"a": 0}, "merges": []}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(HOSTILE[case])
    with pytest.raises(SiliconError) as caught:
        open_tokenizer(path)
    error = caught.value
    assert error.kind == "bad_data" and error.where == str(path) and error.fix and "\n" not in error.what


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_opens_or_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(byte_tokenizer().json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.json"
    path.write_bytes(content)
    try:
        made = open_tokenizer(path)
    except SiliconError as error:
        assert error.kind == "bad_data"
    else:
        assert made.size > 0


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Broken:
        @staticmethod
        def from_str(_: str) -> None:
            raise PanicException("index out of bounds\nat line 1")

    (tmp_path / "tokenizer.json").write_text(BPE.json())
    monkeypatch.setattr(module.tokenizers, "Tokenizer", Broken)
    with pytest.raises(SiliconError, match=r"cannot load it: index out of bounds \("):
        open_tokenizer(tmp_path)


def test_other_exceptions_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), module._rust("doing", "here"):
        raise KeyboardInterrupt


def test_the_end_of_text_token_goes_by_several_names(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for name in ("</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|im_end|>"):
        path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, name: 1}, "merges": []}}))
        assert open_tokenizer(path).eos == 1
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    with pytest.raises(SiliconError, match=r"no end-of-text token; looked for <\|endoftext\|>, </s>"):
        open_tokenizer(path)


def test_missing_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SiliconError, match=r"Did you mean bpe\?"):
        open_tokenizer(Path("bpee"))
    (tmp_path / "tokenizer.json").write_text(BPE.json())
    monkeypatch.setattr(module, "MAX_FILE", 1 << 10)
    with pytest.raises(SiliconError, match="larger than"):
        open_tokenizer(tmp_path)


def test_text_that_no_file_can_hold_is_refused() -> None:
    for made in (byte_tokenizer(), BPE):
        with pytest.raises(SiliconError, match="cannot encode"):
            made.encode("a\ud800")
