"""A tokenizer shows itself: size, bytes per token, and every token of a text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers

from siliconlm.data.prepare import prepare
from siliconlm.data.tokenizer import bpe_tokenizer, byte_tokenizer, open_tokenizer
from siliconlm.data.vocabulary import describe, is_tokenizer, piece
from siliconlm.errors import SiliconError

VERSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, “speak” — naïve 🙂.\n\n"


@pytest.fixture(autouse=True)
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("verse.txt").write_text(VERSE * 50)
    list(prepare(["verse.txt"], "plays", "bpe", 320))
    return tmp_path / "home" / "data" / "plays"


def test_a_dataset_is_measured_on_its_validation_text(dataset: Path) -> None:
    found = describe("plays")
    made = open_tokenizer(dataset / "tokenizer.json")
    text = (VERSE * 50)[len(VERSE) * 45 :]
    assert (found.kind, found.size, found.sha256) == ("bpe", 320, made.sha256)
    assert found.bytes_per_token == pytest.approx(len(text.encode()) / len(made.encode(text)), rel=0.01)
    assert found.measured == "the validation text of plays"
    assert found.ids[0] == made.eos and text.startswith(made.decode(found.ids))
    assert found == describe(str(dataset))


def test_a_text_is_cut_into_its_tokens(dataset: Path) -> None:
    found = describe("plays", text="Speak, naïve 🙂")
    made = open_tokenizer(dataset / "tokenizer.json")
    assert found.ids == made.encode("Speak, naïve 🙂") and found.measured == "this text"
    assert found.bytes_per_token == len("Speak, naïve 🙂".encode()) / len(found.ids)
    data = re.sub(rb"<0x(..)>", lambda found: bytes.fromhex(found[1].decode()), "".join(found.pieces).encode())
    assert data.decode() == "Speak, naïve 🙂" and "<0xF0>" in "".join(found.pieces)
    assert describe("plays", text="").bytes_per_token == 0


def test_a_file_and_a_folder_have_no_text_of_their_own(dataset: Path) -> None:
    for word in (dataset / "tokenizer.json", dataset.parent / "copy"):
        (dataset.parent / "copy").mkdir(exist_ok=True)
        (dataset.parent / "copy" / "tokenizer.json").write_bytes((dataset / "tokenizer.json").read_bytes())
        assert is_tokenizer(str(word))
        found = describe(str(word))
        assert found.ids == found.pieces == [] and found.bytes_per_token is None
        assert describe(str(word), data="plays").ids == describe("plays").ids
    Path("byte.json").write_text(byte_tokenizer().json())
    assert describe("byte.json", data="plays").ids == [], "the text was cut by another tokenizer"
    assert not is_tokenizer("nothing")
    with pytest.raises(SiliconError, match="no such tokenizer"):
        describe("nothing")


def test_pieces_are_readable() -> None:
    made = byte_tokenizer()
    assert [piece(made, id) for id in [made.eos, *made.encode("aé\n")]] == [
        "<|endoftext|>",
        "a",
        "<0xC3>",
        "<0xA9>",
        "\n",
    ]
    learned = bpe_tokenizer(["é" * 9 + "naïve " * 9], 270)
    assert "é" in [piece(learned, id) for id in range(learned.size)]
    inner = Inner(models.WordLevel({"</s>": 0, "▁To": 1, "<unk>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    Path("words.json").write_text(inner.to_str())
    assert describe("words.json", text="To be").pieces == ["▁To", "<unk>"]
