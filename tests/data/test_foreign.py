"""Token files of other programs keep their tokens and their split, and come back byte for byte.

The files are made here as the other programs make them: nanoGPT's data/shakespeare_char/prepare.py and
data/openwebtext/prepare.py, llm.c's dev/data/data_common.py, TinyRecursiveModels' dataset builders.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from siliconlm.data import foreign, write
from siliconlm.data.chat import open_template
from siliconlm.data.conversations import prepare_chat
from siliconlm.data.dataset import Dataset, open_dataset
from siliconlm.data.foreign import find_token_files, read_meta
from siliconlm.data.prepare import prepare
from siliconlm.data.remake import remake_command
from siliconlm.data.tokenizer import Tokenizer, bpe_tokenizer, char_tokenizer, open_tokenizer
from siliconlm.data.write import write_tokens
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Prepared, Working, Written

VERSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, “speak” — naïve 🙂.\n\n"
TEXTS = [f"{number}: {VERSE[: 20 + number]}" for number in range(60)]
BPE = bpe_tokenizer(TEXTS * 3, 320)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def made(*args: Any, **options: Any) -> Dataset:
    last = list(prepare(*args, **options))[-1]
    assert isinstance(last, Prepared)
    return open_dataset(last.path)


def refused(*args: Any, **options: Any) -> SiliconError:
    with pytest.raises(SiliconError) as caught:
        list(prepare(*args, **options))
    assert caught.value.fix and caught.value.where and "\n" not in str(caught.value)
    assert not list(Path("home").rglob("*.bin"))
    return caught.value


def tokens(dataset: Dataset, split: str) -> list[int]:
    shard = getattr(dataset, split)
    return list(shard.read(0, shard.count))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- as the other programs write -------------------------------------------------------------------------------------


def nanogpt_char(folder: Path, text: str) -> None:
    folder.mkdir()
    chars = sorted(list(set(text)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    itos = {i: ch for i, ch in enumerate(chars)}
    n = len(text)
    for split, data in {"train": text[: int(n * 0.9)], "val": text[int(n * 0.9) :]}.items():
        np.array([stoi[c] for c in data], dtype=np.uint16).tofile(folder / f"{split}.bin")
    with open(folder / "meta.pkl", "wb") as f:
        pickle.dump({"vocab_size": len(chars), "itos": itos, "stoi": stoi}, f)


def nanogpt_bpe(folder: Path, texts: list[str], made: Tokenizer) -> None:
    folder.mkdir()
    for split, own in {"train": texts[:-5], "val": texts[-5:]}.items():
        ids = [id for text in own for id in [*made.encode(text), made.eos]]
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")


def llmc(folder: Path, texts: list[str], made: Tokenizer, shard: int, kind: str = "gpt-2") -> None:
    folder.mkdir()
    magic, version, dtype = {"gpt-2": (20240520, 1, np.uint16), "llama-3": (20240801, 7, np.uint32)}[kind]
    for split, own, first in (("val", texts[-5:], 0), ("train", texts[:-5], 1)):
        ids = [id for text in own for id in [made.eos, *made.encode(text)]]
        for number, at in enumerate(range(0, len(ids), shard), start=first):
            part = np.array(ids[at : at + shard], dtype=dtype)
            header = np.zeros(256, dtype=np.int32)
            header[0], header[1], header[2] = magic, version, len(part)
            (folder / f"fineweb_{split}_{number:06d}.bin").write_bytes(header.tobytes() + part.tobytes())


def trm(folder: Path, texts: list[str], made: Tokenizer, length: int, pad: int) -> None:
    for split, own in {"train": texts[:-5], "test": texts[-5:]}.items():
        (folder / split).mkdir(parents=True)
        rows = [[*made.encode(text), made.eos][:length] for text in own]
        inputs = np.array([row + [pad] * (length - len(row)) for row in rows], dtype=np.int32)
        np.save(folder / split / "all__inputs.npy", inputs)
        np.save(folder / split / "all__labels.npy", np.where(inputs == pad, -100, inputs))
        (folder / split / "dataset.json").write_text(json.dumps({"seq_len": length, "pad_id": pad, "sets": ["all"]}))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_nanogpts_characters_keep_their_ids(home: Path) -> None:
    text = VERSE * 30
    nanogpt_char(Path("char"), text)
    with made(["char"], "mine") as dataset:
        stoi = pickle.loads(Path("char/meta.pkl").read_bytes())["stoi"]
        assert tokens(dataset, "train") == [stoi[c] for c in text[: int(len(text) * 0.9)]]
        assert dataset.tokenizer.decode(tokens(dataset, "val")) == text[int(len(text) * 0.9) :]
        assert dataset.tokenizer.encode(text) == [stoi[c] for c in text]
        assert dataset.card["tokenizer"]["kind"] == "char" and dataset.tokenizer.eos >= len(stoi)
        val = dataset.card["splits"]["val"]
        assert val["characters"] == len(text) - int(len(text) * 0.9) == val["tokens"] and val["documents"] == 1
        assert val["bytes"] == len(text[int(len(text) * 0.9) :].encode())
        assert dataset.val_bytes_per_token == val["bytes"] / val["tokens"], "no token between documents"
        dataset.verify()
    assert remake_command(home / "data" / "mine") == "silicon prepare char --name mine --force"


def test_nanogpts_bpe_needs_its_tokenizer(home: Path) -> None:
    nanogpt_bpe(Path("bpe"), TEXTS, BPE)
    assert "which tokenizer made them" in (error := refused(["bpe"], "mine")).what and "--tokenizer" in error.fix
    Path("own.json").write_text(BPE.json())
    with made(["bpe"], "mine", "own.json") as dataset:
        assert tokens(dataset, "val") == list(np.fromfile("bpe/val.bin", dtype=np.uint16))
        splits = dataset.card["splits"]
        assert splits["train"]["documents"] == len(TEXTS) - 5 and splits["val"]["documents"] == 5
        assert splits["train"]["bytes"] == len("".join(TEXTS[:-5]).encode())
        assert splits["train"]["characters"] == len("".join(TEXTS[:-5]))
        assert splits["val"]["learned_text"] == splits["val"]["tokens"] - 5
        assert dataset.tokenizer.sha256 == BPE.sha256
    assert remake_command(home / "data" / "mine").endswith("tokenizer.json --force")
    shutil.copy("own.json", "bpe/tokenizer.json")
    with made(["bpe"], "other") as other:
        assert other.tokenizer.sha256 == BPE.sha256


@pytest.mark.parametrize("kind", ["gpt-2", "llama-3"])
def test_llmcs_shards_go_one_after_the_other(kind: str) -> None:
    llmc(Path("shards"), TEXTS, BPE, 300, kind)
    assert len(os.listdir("shards")) > 2
    Path("own.json").write_text(BPE.json())
    with made(["shards"], "mine", "own.json") as dataset:
        for split, texts in {"train": TEXTS[:-5], "val": TEXTS[-5:]}.items():
            assert tokens(dataset, split) == [id for text in texts for id in [BPE.eos, *BPE.encode(text)]]
            assert dataset.card["splits"][split]["bytes"] == len("".join(texts).encode())
            assert dataset.card["splits"][split]["documents"] == len(texts)


def test_trms_rows_lose_their_padding_alone() -> None:
    pad = BPE.size - 1
    trm(Path("rows"), TEXTS, BPE, 30, pad)
    (Path("rows") / "tokenizer").mkdir()
    (Path("rows") / "tokenizer" / "tokenizer.json").write_text(BPE.json())
    with made(["rows"], "mine") as dataset:
        for split, texts in {"train": TEXTS[:-5], "val": TEXTS[-5:]}.items():
            assert tokens(dataset, split) == [id for text in texts for id in [*BPE.encode(text), BPE.eos][:30]]


def test_a_row_of_padding_alone_holds_nothing(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        rows = np.array([[9, 9, 9], [1, 9, 2], [9, 3, 9], [4, 9, 9]])
        np.save(tmp_path / split / "all__inputs.npy", rows)
        (tmp_path / split / "dataset.json").write_text('{"pad_id": 9}')
    found = find_token_files(tmp_path)
    assert found and found.format == "trm"
    assert np.concatenate(list(found.files["val"][0].read(lambda _: None))).tolist() == [1, 9, 2, 9, 3, 4]


def test_what_is_no_byte_level_tokenizer_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of characters and bytes through words: a tokenizer whose tokens have no bytes of their own."""
    monkeypatch.setattr(foreign, "PIECE", 64)
    monkeypatch.setattr(foreign, "LONGEST_TEXT", 100)
    inner = Inner(models.WordLevel({"</s>": 0, "▁To": 1, "▁bé": 2, "▁or": 3, "<unk>": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    Path("own.json").write_text(inner.to_str())
    own = open_tokenizer(Path("own.json"))
    nanogpt_bpe(Path("words"), ["To bé or"] * 40, own)
    with made(["words"], "mine", "own.json") as dataset:
        assert dataset.card["splits"]["train"]["characters"] == 35 * len("To bé or")
        assert dataset.card["splits"]["train"]["bytes"] == 35 * len("To bé or".encode())


def test_the_same_again_is_used_again_and_other_tokens_need_a_word(home: Path) -> None:
    nanogpt_char(Path("char"), VERSE * 30)
    list(prepare(["char"], "mine"))
    last = list(prepare(["char"], "mine"))[-1]
    assert isinstance(last, Prepared) and last.reused
    shutil.rmtree("char")
    nanogpt_char(Path("char"), VERSE * 31)
    with pytest.raises(SiliconError, match="made from other text"):
        list(prepare(["char"], "mine"))


def test_wishes_that_tokens_cannot_meet_are_told() -> None:
    nanogpt_char(Path("char"), VERSE * 30)
    Path("a.txt").write_text(VERSE * 9)
    assert "cannot make them" in refused(["char"], "mine", "bpe").what
    assert "stands alone" in refused(["char", "a.txt"], "mine").what
    events = list(prepare(["char"], "mine", vocab_size=300, val_fraction=0.2, field="body"))
    told = [event.message for event in events if isinstance(event, Notice)]
    assert [message.split()[0] for message in told] == ["--field", "--vocab-size", "--val-fraction"]


# --- writing ---------------------------------------------------------------------------------------------------------


def written(dataset: str, format: str, folder: str) -> list[Event]:
    events = list(write_tokens(dataset, format, Path(folder)))
    last = events[-1]
    assert isinstance(last, Written) and last.files == sorted(os.listdir(folder))
    return events


def test_nanogpts_files_come_back_byte_for_byte() -> None:
    nanogpt_char(Path("char"), VERSE * 30)
    nanogpt_bpe(Path("bpe"), TEXTS, BPE)
    Path("own.json").write_text(BPE.json())
    list(prepare(["char"], "one"))
    list(prepare(["bpe"], "two", "own.json"))
    for name, folder in {"one": "char", "two": "bpe"}.items():
        written(name, "nanogpt", f"{folder}-again")
        assert contents(Path(f"{folder}-again")) == contents(Path(folder))


@pytest.mark.parametrize("kind", ["gpt-2", "llama-3"])
@pytest.mark.parametrize("shard", [300, 1 << 20])
def test_llmcs_files_come_back_byte_for_byte(monkeypatch: pytest.MonkeyPatch, kind: str, shard: int) -> None:
    monkeypatch.setattr(write, "READ", 300)
    llmc(Path("shards"), TEXTS, BPE, shard, kind)
    Path("own.json").write_text(BPE.json())
    list(prepare(["shards"], "mine", "own.json"))
    written("mine", "llmc", "again")
    assert contents(Path("again")) == contents(Path("shards"))


def test_our_text_is_what_nanogpt_would_have_made_of_it() -> None:
    text = VERSE * 30
    Path("input.txt").write_text(text)
    nanogpt_char(Path("theirs"), text)
    list(prepare(["input.txt"], "mine", "char"))
    written("mine", "nanogpt", "ours")
    assert contents(Path("ours")) == contents(Path("theirs"))


@pytest.mark.parametrize("shard", [300, 1 << 20])
def test_our_texts_are_what_the_others_would_have_made_of_them(monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    monkeypatch.setattr(write, "READ", 300)
    monkeypatch.setattr(write, "SHARD", shard)
    Path("fineweb.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    Path("own.json").write_text(BPE.json())
    share = (len("".join(TEXTS[-5:])) - 0.5) / len("".join(TEXTS))
    list(prepare(["fineweb.jsonl"], "fineweb", "own.json", val_fraction=share))
    nanogpt_bpe(Path("nanogpt"), TEXTS, BPE)
    llmc(Path("llmc"), TEXTS, BPE, shard)
    for format in ("nanogpt", "llmc"):
        written("fineweb", format, f"our-{format}")
        ours = contents(Path(f"our-{format}"))
        assert ours.pop("tokenizer.json").decode() == BPE.json()
        assert ours == contents(Path(format))
        with made([f"our-{format}"], f"again-{format}") as dataset, open_dataset("fineweb") as first:
            assert sorted(tokens(dataset, "train")) == sorted(tokens(first, "train"))


def test_the_end_of_text_moves_from_one_format_to_the_other() -> None:
    Path("own.json").write_text(BPE.json())
    nanogpt_bpe(Path("nanogpt"), TEXTS, BPE)
    llmc(Path("llmc"), TEXTS, BPE, 1 << 20)
    list(prepare(["nanogpt"], "fineweb", "own.json"))
    list(prepare(["llmc"], "shards", "own.json"))
    written("fineweb", "llmc", "a")
    written("shards", "nanogpt", "b")
    assert contents(Path("a")).items() > contents(Path("llmc")).items()
    assert contents(Path("b")).items() > contents(Path("nanogpt")).items()


def test_borders_between_characters_are_told() -> None:
    Path("a.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    list(prepare(["a.jsonl"], "mine", "char"))
    events = written("mine", "nanogpt", "out")
    assert any(isinstance(event, Notice) and "borders were left out" in event.message for event in events)
    with made(["out"], "again") as again, open_dataset("mine") as first:
        for split in ("train", "val"):
            assert again.tokenizer.decode(tokens(again, split)) == first.tokenizer.decode(tokens(first, split))


@pytest.mark.parametrize("format", ["nanogpt", "llmc"])
def test_conversations_lose_their_marks_and_that_is_told(format: str) -> None:
    turns = [{"role": "user", "content": "Speak"}, {"role": "assistant", "content": "hear me"}]
    Path("chat.jsonl").write_text("\n".join([json.dumps(turns)] * 20))
    template = open_template(char_tokenizer("Speak hear me userassistant\n"), "chatml")
    list(prepare_chat(["chat.jsonl"], "mine", template))
    events = written("mine", format, "out")
    assert isinstance(events[0], Notice) and "which tokens are learned" in events[0].message
    with made(["out"], "again") as again, open_dataset("mine") as first:
        for split in ("train", "val"):
            assert sorted(tokens(again, split)) == sorted(tokens(first, split))


def test_large_ids_go_to_llmc_alone() -> None:
    vocabulary = {f"w{number}": number for number in range(1, 70_000)} | {"</s>": 0}
    inner = Inner(models.WordLevel(vocabulary, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>"])
    Path("own.json").write_text(inner.to_str())
    Path("a.txt").write_text(" ".join(f"w{number}" for number in range(69_000, 69_900)))
    list(prepare(["a.txt"], "mine", "own.json"))
    with pytest.raises(SiliconError, match="ids up to 65,535, and this dataset's go up to 69,8") as caught:
        list(write_tokens("mine", "nanogpt", Path("out")))
    assert caught.value.fix == "Type --write llmc" and not Path("out").exists()
    written("mine", "llmc", "out")
    header = np.fromfile("out/mine_train_000001.bin", dtype=np.int32, count=3)
    assert header[:2].tolist() == [20240801, 7]
    with made(["out"], "again") as again, open_dataset("mine") as first:
        assert tokens(again, "train") == tokens(first, "train")


def test_writing_asks_for_what_it_needs(tmp_path: Path) -> None:
    Path("a.txt").write_text(VERSE * 9)
    list(prepare(["a.txt"], "mine"))
    for args, what in {
        ("mine", "nanogtp", "out"): "--write nanogtp is not known",
        ("mine", "nanogpt", "."): "the folder exists",
        ("mime", "nanogpt", "out"): "no dataset named 'mime'",
    }.items():
        with pytest.raises(SiliconError, match=what) as caught:
            list(write_tokens(args[0], args[1], Path(args[2])))
        assert caught.value.fix
    assert not Path("out").exists()


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    Path("a.txt").write_text(VERSE * 9)
    list(prepare(["a.txt"], "mine"))
    steps = write_tokens("mine", "llmc", Path("out"))
    assert isinstance(next(steps), Working)
    steps.close()  # type: ignore[attr-defined]
    assert sorted(os.listdir()) == ["a.txt", "home"]


# --- what can be wrong -----------------------------------------------------------------------------------------------


def change(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


SHARD = "shards/fineweb_train_000001.bin"
ARRAY = "rows/train/all__inputs.npy"
DAMAGE: dict[str, tuple[Any, str, str]] = {
    "odd": (lambda: Path("bpe/train.bin").write_bytes(b"123"), "an odd number of bytes (3)", "bpe/train.bin"),
    "large id": (lambda: change("bpe/val.bin", 100, b"\xff\xff"), "a token 65535 in it is none of", "bpe/val.bin"),
    "no val": (lambda: Path("bpe/val.bin").unlink(), "no val tokens beside train.bin", "bpe"),
    "empty": (lambda: Path("bpe/val.bin").write_bytes(b""), "too few tokens: val has 0", "bpe"),
    "magic": (lambda: change(SHARD, 0, b"\1"), "the header begins with 20240385 1, not 20240520 1 or", SHARD),
    "version": (lambda: change(SHARD, 4, b"\2"), "the header begins with 20240520 2, not", SHARD),
    "short": (lambda: Path(SHARD).write_bytes(Path(SHARD).read_bytes()[:-1]), "cut short: ", SHARD),
    "long": (lambda: Path(SHARD).write_bytes(Path(SHARD).read_bytes() + b"1"), "too long: ", SHARD),
    "no header": (lambda: Path(SHARD).write_bytes(b"1"), "the header begins with 49 0", SHARD),
    "no shard": (
        lambda: [p.unlink() for p in Path("shards").glob("*_val_*")],
        "no val tokens beside fineweb",
        "shards",
    ),
    "cut array": (lambda: Path(ARRAY).write_bytes(Path(ARRAY).read_bytes()[:-4]), "cut short: ", ARRAY),
    "no array": (lambda: Path(ARRAY).write_bytes(b"text"), "not an array of NumPy", ARRAY),
    "objects": (lambda: np.save(ARRAY, np.array([[{}]]), allow_pickle=True), "not rows of integers", ARRAY),
    "one row": (lambda: np.save(ARRAY, np.arange(9)), "not rows of integers", ARRAY),
    "negative": (lambda: np.save(ARRAY, np.full((3, 3), -100)), "a token -100 in it is none of", ARRAY),
    "no pad": (
        lambda: Path("rows/train/dataset.json").write_text("{}"),
        "no number `pad_id`",
        "rows/train/dataset.json",
    ),
    "not JSON": (lambda: Path("rows/train/dataset.json").write_text("{"), "not JSON", "rows/train/dataset.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named(case: str) -> None:
    Path("own.json").write_text(BPE.json())
    nanogpt_bpe(Path("bpe"), TEXTS, BPE)
    llmc(Path("shards"), TEXTS, BPE, 1 << 20)
    trm(Path("rows"), TEXTS, BPE, 30, 2)
    damage, what, where = DAMAGE[case]
    damage()
    error = refused([where.split("/")[0]], "mine", "own.json")
    assert what in error.what and error.where == where


def test_a_dataset_of_ours_is_told_from_nanogpts(home: Path) -> None:
    Path("a.txt").write_text(VERSE * 9)
    list(prepare(["a.txt"], "mine"))
    with pytest.raises(SiliconError, match="a dataset of SiliconLM already") as caught:
        list(prepare([str(home / "data" / "mine")], "other"))
    assert caught.value.fix == f"Type: silicon train --data {home / 'data' / 'mine'}"


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


METAS: dict[str, tuple[Any, str]] = {
    "code": ({"stoi": Harm()}, "it would run posix.mkdir"),
    "class": (np.float64(1), "it would run numpy"),
    "list": ([1, 2], "no `stoi` in it"),
    "no characters": ({"stoi": {"ab": 0}}, "does not number characters"),
    "gaps": ({"stoi": {"a": 0, "b": 2}}, "are not 0 to 1, each once"),
    "text": ({"stoi": {"a": "b"}}, "does not number characters"),
    "half": ({"stoi": {"\ud800": 0}}, "half a surrogate pair"),
}


@pytest.mark.parametrize("case", METAS)
def test_no_code_in_a_pickle_is_run(tmp_path: Path, case: str) -> None:
    content, why = METAS[case]
    nanogpt_char(Path("char"), VERSE * 30)
    Path("char/meta.pkl").write_bytes(pickle.dumps(content))
    error = refused(["char"], "mine")
    assert why in error.what and "--tokenizer" in error.fix and error.where == "char/meta.pkl"
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"text", b"\x80\x04}q", b"(lp0\n." * 2, b"\x80\x04\x8c\xff", b"h\1."]
)
def test_what_is_no_pickle_is_told(tmp_path: Path, data: bytes) -> None:
    Path("meta.pkl").write_bytes(data)
    with pytest.raises(SiliconError, match=r"not nanoGPT's meta\.pkl"):
        read_meta(Path("meta.pkl"))


def test_a_file_that_changes_while_it_is_copied_is_noticed(home: Path) -> None:
    nanogpt_char(Path("char"), VERSE * 30)
    steps = prepare(["char"], "mine")
    while not (isinstance(event := next(steps), Working) and event.done == event.total):
        pass
    change("char/val.bin", 0, b"\5\0")
    with pytest.raises(SiliconError, match="changed while it was read"):
        list(steps)
    assert os.listdir(home / "data") == []
