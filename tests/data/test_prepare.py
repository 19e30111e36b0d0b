"""A dataset appears whole or not at all, and holds the text that went in, to the last character."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet

from siliconlm.data import prepare as module
from siliconlm.data.dataset import Dataset, datasets, open_dataset
from siliconlm.data.prepare import prepare
from siliconlm.data.remake import remake_command
from siliconlm.data.sources import builtin_pieces
from siliconlm.data.tokenizer import bpe_tokenizer, byte_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Notice, Prepared, Working

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"
VERSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, “speak” — naïve 🙂.\n\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def verse(tmp_path: Path) -> str:
    path = tmp_path / "verse.txt"
    path.write_bytes((VERSE * 50).encode())
    return str(path)


def made(*args: object, **options: object) -> Prepared:
    last = list(prepare(*args, **options))[-1]  # type: ignore[arg-type]
    assert isinstance(last, Prepared)
    return last


def split_text(dataset: Dataset, split: str) -> str:
    shard = getattr(dataset, split)
    return dataset.tokenizer.decode(shard.read(0, shard.count).tolist())


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_the_text_comes_back_from_the_tokens(verse: str, home: Path, kind: str) -> None:
    done = made([verse], "mine", kind, vocab_size=300)
    text = VERSE * 50
    with open_dataset("mine") as dataset:
        n_train = len(text) * 9 // 10
        assert split_text(dataset, "train") == text[:n_train]
        assert split_text(dataset, "val") == text[n_train:]
        assert dataset.train.read(0, 1)[0] == dataset.val.read(0, 1)[0] == dataset.tokenizer.eos
        assert dataset.val_bytes_per_token == len(text[n_train:].encode()) / (dataset.val.count - 1)
        assert dataset.card == done.card == json.loads((home / "data" / "mine" / "dataset.json").read_text())
        dataset.verify()
    assert sorted(os.listdir(home / "data" / "mine")) == ["dataset.json", "tokenizer.json", "train.bin", "val.bin"]
    assert os.listdir(home / "data") == ["mine"] == datasets()


def test_the_card_says_what_is_in_it(verse: str) -> None:
    card = made([verse], "mine").card
    text = VERSE * 50
    data = text.encode()
    assert card["format"] == 1 and card["name"] == "mine" and card["tokenizer"]["kind"] == "byte"
    [source] = card["sources"]
    assert source["given"] == verse
    assert source["files"] == [{"name": verse, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    train, val = card["splits"]["train"], card["splits"]["val"]
    assert train["characters"] + val["characters"] == len(text)
    assert train["bytes"] + val["bytes"] == len(data) == train["tokens"] + val["tokens"] - 2
    assert train["documents"] == val["documents"] == 1
    assert "seed" not in card and "entropy_floor" not in card


@pytest.mark.skipif(not REAL.exists(), reason="needs tiny Shakespeare beside the repository")
def test_tiny_shakespeare_has_the_known_numbers() -> None:
    card = made([str(REAL)], "tiny", "char").card
    assert card["tokenizer"]["size"] == 68
    assert [card["splits"][split]["characters"] for split in ("train", "val")] == [1_003_854, 111_540]
    assert [card["splits"][split]["tokens"] for split in ("train", "val")] == [1_003_855, 111_541]
    with open_dataset("tiny") as dataset:
        assert split_text(dataset, "val") == REAL.read_text()[1_003_854:]


@pytest.mark.skipif(not REAL.exists(), reason="needs tiny Shakespeare beside the repository")
def test_streaming_gives_the_tokens_of_the_whole_text(home: Path) -> None:
    made([str(REAL)], "tiny", "bpe", vocab_size=1024)
    plain = tokenizers.Tokenizer.from_file(str(home / "data" / "tiny" / "tokenizer.json"))
    with open_dataset("tiny") as dataset:
        expected = plain.encode(REAL.read_text()[:1_003_854]).ids
        assert np.array_equal(dataset.train.read(1, dataset.train.count - 1), expected)


def test_the_split_is_exact_whatever_the_fraction() -> None:
    Path("a.txt").write_text("a" * 1000)
    for fraction in (0.1, 0.3, 0.7, 0.9, 0.007):
        card = made(["a.txt"], "a", val_fraction=fraction, force=True).card
        assert card["splits"]["val"]["characters"] == round(1000 * fraction)


def test_documents_begin_with_the_end_of_text_and_the_split_may_cut_one() -> None:
    lengths = [300, 0, 200, 499, 1]
    Path("texts").mkdir()
    for number, length in enumerate(lengths):
        Path(f"texts/{number}.txt").write_text(str(number) * length)
    events = list(prepare(["texts"], "docs", val_fraction=0.4))
    assert any(isinstance(event, Notice) and "1 file without text" in event.message for event in events)
    with open_dataset("docs") as dataset:
        one = byte_tokenizer().encode
        eos = dataset.tokenizer.eos
        train = [eos, *one("0" * 300), eos, *one("2" * 200), eos, *one("3" * 100)]
        val = [eos, *one("3" * 399), eos, *one("4")]
        assert dataset.train.read(0, dataset.train.count).tolist() == train
        assert dataset.val.read(0, dataset.val.count).tolist() == val
        assert [dataset.card["splits"][split]["documents"] for split in ("train", "val")] == [3, 2]


KINDS_OF_FILE = ["texts.jsonl", "texts.json", "texts.parquet"]


def write_texts(name: str, texts: list[str], field: str = "text") -> None:
    records = [{field: text, "id": number} for number, text in enumerate(texts)]
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), name)
    else:
        Path(name).write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))


@pytest.mark.parametrize("name", KINDS_OF_FILE)
@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_each_record_is_a_document(name: str, kind: str) -> None:
    texts = [f"{number}: {VERSE[: number % 90]}" for number in range(300)]
    write_texts(name, [*texts[:7], "", " \n", *texts[7:]])
    events = list(prepare([name], "docs", kind, 300, val_fraction=0.25))
    assert any(isinstance(event, Notice) and "left out 2 records without text" in event.message for event in events)
    whole = "".join(texts)
    n_train = len(whole) * 3 // 4
    with open_dataset("docs") as dataset:
        encode, eos = dataset.tokenizer.encode, dataset.tokenizer.eos
        at, train, val = 0, [], []
        for text in texts:
            head, tail = text[: max(0, n_train - at)], text[max(0, n_train - at) :]
            train += [eos, *encode(head)] if head else []
            val += [eos, *encode(tail)] if tail else []
            at += len(text)
        assert dataset.train.read(0, dataset.train.count).tolist() == train
        assert dataset.val.read(0, dataset.val.count).tolist() == val
        splits = dataset.card["splits"]
        assert splits["train"]["documents"] == train.count(eos) and splits["val"]["documents"] == val.count(eos)
        assert splits["train"]["characters"] == n_train and splits["val"]["characters"] == len(whole) - n_train
        assert splits["val"]["bytes"] == len(whole[n_train:].encode())
    [entry] = dataset.card["sources"][0]["files"]
    data = Path(name).read_bytes()
    assert entry == {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_another_field_makes_another_dataset() -> None:
    records = [{"text": VERSE, "body": VERSE[::-1]} for _ in range(9)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    made(["a.jsonl"], "mine")
    with pytest.raises(SiliconError, match="made with another field"):
        made(["a.jsonl"], "mine", field="body")
    made(["a.jsonl"], "mine", field="body", force=True)
    assert "--field body" in remake_command(module.data_folder() / "mine")
    with open_dataset("mine") as dataset:
        assert split_text(dataset, "train").startswith(VERSE[::-1])


def test_the_same_bytes_as_text_and_as_records_are_two_datasets() -> None:
    Path("a.jsonl").write_text((json.dumps({"text": VERSE}) + "\n") * 9)
    Path("a.txt").write_bytes(Path("a.jsonl").read_bytes())
    made(["a.jsonl"], "mine")
    with pytest.raises(SiliconError, match="made from other text"):
        made(["a.txt"], "mine")
    assert made(["a.jsonl"], "mine").reused


def test_a_bad_record_leaves_nothing(home: Path) -> None:
    Path("a.jsonl").write_text(json.dumps({"text": VERSE * 9}) + "\n{")
    with pytest.raises(SiliconError, match="not JSON") as caught:
        made(["a.jsonl"], "mine")
    assert caught.value.where == "a.jsonl line 2" and os.listdir(home / "data") == []


def test_a_split_between_documents_leaves_no_empty_one() -> None:
    Path("a.txt").write_text("a" * 900)
    Path("b.txt").write_text("b" * 100)
    card = made(["a.txt", "b.txt"], "ab").card
    assert [card["splits"][split]["documents"] for split in ("train", "val")] == [1, 1]


def test_progress_goes_up_to_its_total(verse: str) -> None:
    steps = [event for event in prepare([verse], "mine") if isinstance(event, Working)]
    assert {step.what for step in steps} == {"reading", "encoding"}
    for what in ("reading", "encoding"):
        own = [step for step in steps if step.what == what]
        assert [step.done for step in own] == sorted(step.done for step in own) and own[-1].done == own[-1].total


def test_the_built_in_corpus_carries_its_floor() -> None:
    card = made(["builtin"], "built").card
    floor = card["entropy_floor"]
    assert card["seed"] == 1 and 0 < floor["grammar"] < 2
    whole = sum(piece.nats for piece in builtin_pieces()) / sum(len(piece.text) for piece in builtin_pieces())
    assert floor["val"] == pytest.approx(whole, rel=0.05) and floor["val"] == pytest.approx(floor["grammar"], rel=0.05)


# --- again, and otherwise --------------------------------------------------------------------------------------------


def test_the_same_again_is_used_again(verse: str, home: Path) -> None:
    first = made([verse], "mine", "bpe", 300)
    before = (home / "data" / "mine" / "train.bin").stat().st_mtime_ns
    again = made([verse], "mine", "bpe", 300)
    assert again.reused and not first.reused and again.card == first.card
    assert (home / "data" / "mine" / "train.bin").stat().st_mtime_ns == before
    assert not made([verse], "mine", "bpe", 300, force=True).reused


def test_other_text_or_settings_need_a_word(verse: str) -> None:
    made([verse], "mine")
    for change in ({"tokenizer": "char"}, {"val_fraction": 0.2}, {"tokenizer": "bpe"}):
        with pytest.raises(SiliconError, match="exists and was made with another") as caught:
            made([verse], "mine", **change)
        assert caught.value.kind == "cannot_create"
    with open_dataset("mine") as dataset:
        before = dataset.fingerprint
    Path(verse).write_text(VERSE * 51)
    with pytest.raises(SiliconError, match="dataset mine exists and was made from other text") as caught:
        made([verse], "mine")
    assert "--name OTHER" in caught.value.fix and "--force" in caught.value.fix
    assert not made([verse], "mine", force=True).reused
    with open_dataset("mine") as dataset:
        assert dataset.fingerprint != before


def test_the_fingerprint_is_of_the_data_alone(verse: str, tmp_path: Path) -> None:
    made([verse], "one")
    made([verse], "two", folder=tmp_path / "elsewhere")
    made([verse], "three", val_fraction=0.2)
    with open_dataset("one") as one, open_dataset(str(tmp_path / "elsewhere" / "two")) as two:
        assert one.fingerprint == two.fingerprint and two.name == "two"
    with open_dataset("three") as three:
        assert three.fingerprint != one.fingerprint
    assert datasets() == ["one", "three"]


def test_a_given_tokenizer_is_copied_to_the_letter(verse: str, tmp_path: Path, home: Path) -> None:
    given = json.dumps(json.loads(bpe_tokenizer([VERSE], 300).json()), indent=1)
    (tmp_path / "own.json").write_text(given)
    done = made([verse], "mine", "own.json")
    assert done.card["tokenizer"]["kind"] == "own.json"
    assert (home / "data" / "mine" / "tokenizer.json").read_text() == given
    assert made([verse], "mine", "own.json").reused


def test_a_given_tokenizer_that_changes_the_text_is_told(verse: str, tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "<unk>": 1, "speak": 2}, "unk_token": "<unk>"}
    own = {"model": model, "normalizer": {"type": "Prepend", "prepend": "x"}, "pre_tokenizer": {"type": "Whitespace"}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    notices = [event for event in prepare([verse], "mine", "own.json") if isinstance(event, Notice)]
    assert "loses" in notices[0].message and notices[0].level == "warning"
    assert "beginning of a text" in notices[1].message


def test_a_vocabulary_that_stays_small_is_told(verse: str) -> None:
    notices = [event.message for event in prepare([verse], "mine", "bpe", 5056) if isinstance(event, Notice)]
    assert len(notices) == 1 and "not 5,056" in notices[0]


def test_a_vocabulary_is_a_multiple_of_64() -> None:
    Path("a.txt").write_text("".join(piece.text for piece in builtin_pieces()[:2000]))
    events = list(prepare(["a.txt"], "mine", "bpe", 290))
    [notice] = [event.message for event in events if isinstance(event, Notice)]
    assert notice == "--vocab-size 290 was rounded up to 320, a multiple of 64"
    with open_dataset("mine") as dataset:
        assert dataset.tokenizer.size == 320 and dataset.card["recipe"]["vocab_size"] == 320
    assert made(["a.txt"], "mine", "bpe", 320).reused


def test_a_long_text_is_learned_from_in_part(verse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEARN_FROM", 2000)
    monkeypatch.setattr(module, "DISTINCT", 1000)
    with pytest.raises(StopIteration) as end:
        next(module.open_sources([verse]))
    text = module._Text(end.value.value)
    list(module._scan(text, alphabet=False))
    text.n_train = text.characters
    learned = sum(len(chunk.encode()) for chunk in module._sample(text, 1000))
    assert 500 < learned < 1500
    assert module._learnable(text) == 2000
    notices = [event.message for event in prepare([verse], "mine", "bpe", 300) if isinstance(event, Notice)]
    assert any("learned from" in notice for notice in notices)


# --- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "_a", "-a", "a b", "x" * 81, "é", "a\n"])
def test_names_that_are_no_file_names(verse: str, name: str, home: Path) -> None:
    with pytest.raises(SiliconError, match="cannot be the name"):
        made([verse], name)
    assert not home.exists()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_fractions_that_leave_nothing(verse: str, fraction: float) -> None:
    with pytest.raises(SiliconError, match="not between 0 and 1"):
        made([verse], "mine", val_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.1, 0.0001, 0.9999])
def test_text_that_is_too_small(fraction: float, home: Path) -> None:
    Path("a.txt").write_text("x" * (199 if fraction == 0.1 else 250))
    with pytest.raises(SiliconError, match="too small") as caught:
        made(["a.txt"], "mine", val_fraction=fraction)
    assert caught.value.kind == "bad_data" and "a.txt" in caught.value.where
    assert not list(home.rglob("*.bin")) and datasets() == []


def test_an_interrupted_prepare_leaves_nothing(verse: str, home: Path) -> None:
    steps = prepare([verse], "mine")
    while not (isinstance(event := next(steps), Working) and event.what == "encoding"):
        pass
    assert len(os.listdir(home / "data")) == 2, "the stage and the lock"
    steps.close()  # type: ignore[attr-defined]
    assert os.listdir(home / "data") == []


def test_what_a_killed_prepare_left_is_swept_and_nobody_elses(verse: str, home: Path) -> None:
    data = home / "data"
    for name in (".tmp-mine.0123abcd", ".trash-mine.0123abcd", ".tmp-mine.b.0123abcd", ".tmp-other.0123abcd"):
        (data / name).mkdir(parents=True)
        (data / name / "train.bin").write_bytes(b"half")
    (data / ".lock-mine").touch()  # without its process a lock holds nothing
    made([verse], "mine")
    assert sorted(os.listdir(data)) == [".tmp-mine.b.0123abcd", ".tmp-other.0123abcd", "mine"]


HOLDER = """
import sys
from siliconlm.data.prepare import prepare
steps = prepare([sys.argv[1]], "mine")
next(steps)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_name_that_another_process_prepares_is_refused(verse: str, home: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, verse]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(SiliconError, match="dataset mine is being prepared by another process") as caught:
            made([verse], "mine")
        assert caught.value.kind == "run_in_use"
        made([verse], "other")
        holder.kill()
    made([verse], "mine")
    assert sorted(os.listdir(home / "data")) == ["mine", "other"]


def test_a_name_prepared_just_before_the_lock_is_used_again(verse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made([verse], "mine")
    answers = iter([False])
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: next(answers, None) is not False and exists(path))
    assert made([verse], "mine").reused


def test_a_full_disk_leaves_the_old_dataset(verse: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made([verse], "mine")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.ShardWriter, "write", full)
    with pytest.raises(OSError, match="No space"):
        made([verse], "mine", force=True)
    assert os.listdir(home / "data") == ["mine"]
    with open_dataset("mine") as dataset:
        dataset.verify()


@pytest.mark.parametrize("change", ["shorter", "longer", "other"])
@pytest.mark.parametrize("name", ["verse.txt", "verse.jsonl"])
def test_a_file_that_changes_while_it_is_read_is_noticed(home: Path, name: str, change: str) -> None:
    text = (VERSE * 50).strip() if name.endswith("txt") else (json.dumps({"text": VERSE}) + "\n") * 50
    Path(name).write_text(text)
    steps = prepare([name], "mine")
    next(steps)
    beside = Path("beside")
    beside.write_text({"shorter": text[: len(text) // 5 * 4], "longer": text * 2, "other": text}[change])
    beside.replace(name)
    with pytest.raises(SiliconError, match="changed while it was read"):
        list(steps)
    assert not list(home.rglob("*.bin"))


def test_bad_bytes_leave_nothing(home: Path) -> None:
    Path("a.txt").write_bytes(b"x" * 3_000_000 + b"\xff")
    with pytest.raises(SiliconError, match="at offset 3,000,000"):
        made(["a.txt"], "mine")
    assert os.listdir(home / "data") == []


def test_a_dataset_that_is_not_there(verse: str) -> None:
    with pytest.raises(SiliconError, match="There are none yet"):
        open_dataset("mine")
    made([verse], "mine")
    with pytest.raises(SiliconError, match=r"Did you mean mine\? There are: mine\. Make one: silicon prepare"):
        open_dataset("minne")
    with pytest.raises(SiliconError, match="no dataset"):
        open_dataset("")


def damage(folder: Path, case: str) -> None:
    if case.startswith("no "):
        (folder / case[3:]).unlink()
    elif case == "swapped":
        (folder / "train.bin").write_bytes((folder / "val.bin").read_bytes())
    elif case == "other tokenizer":
        (folder / "tokenizer.json").write_text(bpe_tokenizer([VERSE], 300).json())
    elif case == "other format":
        (folder / "dataset.json").write_text('{"format": 2}')
    else:
        (folder / case).write_bytes(b"{")


CASES = ["no dataset.json", "no tokenizer.json", "no train.bin", "no val.bin", "swapped", "other tokenizer"]
CASES += ["other format", "dataset.json", "tokenizer.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_dataset_is_named(verse: str, home: Path, case: str) -> None:
    made([verse], "mine")
    damage(home / "data" / "mine", case)
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(SiliconError) as caught:
        open_dataset("mine")
    assert caught.value.where.startswith(str(home)) and caught.value.fix
    assert len(os.listdir("/dev/fd")) == before
    with pytest.raises(SiliconError):
        made([verse], "mine")
    made([verse], "mine", force=True)
    open_dataset("mine").close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--tokenizer", "byte"]),
        ({"tokenizer": "char", "val_fraction": 0.25}, ["--tokenizer", "char", "--val-fraction", "0.25"]),
        ({"tokenizer": "bpe", "vocab_size": 300}, ["--tokenizer", "bpe", "--vocab-size", "320"]),
    ],
)
def test_the_advice_on_damage_is_the_command_that_made_it(
    home: Path, options: dict[str, Any], words: list[str]
) -> None:
    text = Path("it's mine.txt")
    text.write_text(VERSE * 50)
    made([str(text), "builtin"], "mine", **options)
    with open_dataset("mine") as dataset:
        before = dataset.fingerprint
    damage(home / "data" / "mine", "train.bin")
    with pytest.raises(SiliconError) as shard:
        open_dataset("mine")
    damage(home / "data" / "mine", "no tokenizer.json")
    with pytest.raises(SiliconError) as card:
        open_dataset("mine")
    for error in (shard.value, card.value):
        _, _, command = error.fix.partition(": ")
        expected = ["silicon", "prepare", str(text), "builtin", "--name", "mine", *words, "--force"]
        assert shlex.split(command) == expected
    made([str(text), "builtin"], "mine", **options, force=True)
    with open_dataset("mine") as dataset:
        assert dataset.fingerprint == before


def test_the_advice_names_the_copy_of_a_given_tokenizer(verse: str, tmp_path: Path, home: Path) -> None:
    (tmp_path / "own.json").write_text(bpe_tokenizer([VERSE], 300).json())
    made([verse], "mine", "own.json")
    folder = home / "data" / "mine"
    assert f"--tokenizer {folder / 'tokenizer.json'} --force" in remake_command(folder)
    damage(folder, "tokenizer.json")
    assert "--tokenizer own.json --force" in remake_command(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": 3},
        {"sources": [{"given": "a\nb"}]},
        {"recipe": {}},
        {"recipe": {"val_fraction": []}},
        {"tokenizer": 1},
    ],
)
def test_a_card_that_does_not_say_leaves_dots(verse: str, home: Path, changes: dict[str, Any]) -> None:
    card = made([verse], "mine").card
    (home / "data" / "mine" / "dataset.json").write_text(json.dumps(card | changes))
    assert remake_command(home / "data" / "mine") == "silicon prepare ... --name mine --force"


# --- memory ----------------------------------------------------------------------------------------------------------

CHILD = """
import resource, sys
from siliconlm.data.prepare import prepare
for _ in prepare([sys.argv[1]], "big", sys.argv[2], 1000): pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak if sys.platform == "darwin" else peak * 1024)
"""


def peak_memory(path: Path, kind: str, home: Path) -> int:
    environment = os.environ | {"SILICON_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CHILD, str(path), kind]
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("kind", ["byte", pytest.param("bpe", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(1)
    words = ["".join(map(chr, generator.integers(97, 123, length))) for length in generator.integers(1, 12, 5000)]
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text(" ".join(generator.choice(words, 150_000)))
    with large.open("w") as file:
        for _ in range(30):
            file.write(" ".join(generator.choice(words, 150_000)) + "\n")
    assert large.stat().st_size > 25 * small.stat().st_size
    grown = peak_memory(large, kind, tmp_path / "l") - peak_memory(small, kind, tmp_path / "s")
    assert grown < 150 << 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["large.jsonl", "large.json", "large.parquet"])
def test_a_gigabyte_of_records_takes_less_memory_than_that(tmp_path: Path, name: str) -> None:
    texts = [VERSE * (number % 30) + str(number) for number in range(5000)]
    path, records = tmp_path / name, [json.dumps({"text": text}).encode() for text in texts]
    if name.endswith(".parquet"):
        table = pyarrow.table({"text": texts})
        with parquet.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
            while path.stat().st_size < 1 << 30:
                writer.write_table(table)
    else:
        separator, ends = (b"\n", (b"", b"")) if name.endswith("l") else (b",", (b"[", b"]"))
        block = separator.join(records)
        with path.open("wb") as file:
            file.write(ends[0] + block)
            while file.tell() < 1 << 30:
                file.write(separator + block)
            file.write(ends[1])
    assert peak_memory(path, "byte", tmp_path / "home") < 1 << 30
    path.unlink()


KILLED = """
import sys
from siliconlm.data.prepare import prepare
for event in prepare(sys.argv[2:], "mine"):
    if getattr(event, "what", "").startswith(sys.argv[1]):
        print("there", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("name", [*KINDS_OF_FILE, "tokens"])
def test_a_killed_prepare_can_be_run_again(home: Path, name: str) -> None:
    texts = [VERSE[number % 9 :] for number in range(200)]
    if name == "tokens":
        Path(name).mkdir()
        for split in ("train", "val"):
            np.arange(90, dtype="<u2").tofile(f"tokens/{split}.bin")
        Path("tokens/tokenizer.json").write_text(byte_tokenizer().json())
    else:
        write_texts(name, texts)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, "copying" if name == "tokens" else "encoding", name]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline() == b"there\n"
        child.kill()
    assert datasets() == [] and len(os.listdir(home / "data")) == 2, "the stage and the lock"
    made([name], "mine")
    assert os.listdir(home / "data") == ["mine"]
    with open_dataset("mine") as dataset:
        dataset.verify()
