"""What is wrong, where, and what to type: in one or two lines, with nothing lost and nothing half made."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from siliconlm.errors import SiliconError
from siliconlm.hardware.device import available
from siliconlm.training.checkpoint import RunFolder

if TYPE_CHECKING:
    from .conftest import Result, Silicon, Trained

NOBODY = 65534
ABSENT = next(kind for kind in ("cuda", "mps") if kind not in available())


def refused(done: Result, *says: object, code: int = 1) -> str:
    """Checks that a command ended in order, with an error of one or two lines that says all of `says`; returns it."""
    assert done.code == code and done.out == "", done
    lines = done.err.splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(begins) == 1 and 1 <= len(lines) - begins[0] <= 2, done.err
    assert "Traceback" not in done.err
    text = "\n".join(lines[begins[0] :])
    for word in says:
        assert str(word) in text, f"{word!r} is not in: {text}"
    return text


def listing(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*")) if home.exists() else []


# --- text ------------------------------------------------------------------------------------------------------------

LONG = "To be, or not to be: that is the question.\n" * 20
TEXTS = {
    "empty.txt": (b"", "the file is empty", "Give a file with text in it."),
    "blank.txt": (b" \n" * 500, "only white space", "Give a file with text in it."),
    "short.txt": (b"To be", "5 characters, at least 200 are needed", "Give more text."),
    "binary.txt": (LONG.encode() + b"\0" + LONG.encode(), "a NUL byte at offset 860", "plain UTF-8"),
    "latin.txt": (LONG.encode() + b"caf\xe9 " + LONG.encode(), "byte 0xe9 at offset 863", "iconv -f WINDOWS-1252"),
    "wide.txt": (LONG.encode("utf-16"), "the text is UTF-16, not UTF-8", "iconv -f UTF-16"),
    "cut.txt": (LONG.encode() + "é".encode()[:1], "byte 0xc3 at offset 860", "iconv"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_used(silicon: Silicon, home: Path, tmp_path: Path, name: str) -> None:
    content, what, fix = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    refused(silicon("prepare", name, "--name", "mine"), what, name, fix)
    assert listing(home) in ([], ["data"]), "nothing half made"
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inptu.txt"], ["no such file or folder (inptu.txt)", "Did you mean input.txt?"]),
        (["nowhere/input.txt"], ["no such folder (nowhere)"]),
        (["*.text"], ["no file matches the pattern (*.text)"]),
        (["folder"], ["no text files in the folder (folder)"]),
        (["input.txt", "--name", "a/b"], ["'a/b' cannot be the name of a dataset (--name)", "--name my-text"]),
        (["input.txt", "--name", "../up"], ["'../up' cannot be the name"]),
        (["input.txt", "--tokenizer", "bites"], ["no such tokenizer (bites)", "Did you mean byte?"]),
        (["input.txt", "--tokenizer", "input.txt"], ["not a usable tokenizer.json", "input.txt"]),
        (["input.txt", "--tokenizer", "bpe", "--vocab-size", "9"], ["vocab_size 9 is too small", "--vocab-size 259"]),
        (["input.txt", "--val-fraction", "1.5"], ["val_fraction 1.5 is not between 0 and 1", "--val-fraction 0.1"]),
        (["shakespeare"], ["cannot download tiny Shakespeare", "silicon prepare builtin"]),
    ],
)
def test_preparing_what_is_not_there(
    silicon: Silicon,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    says: list[str],
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens: offline
    (tmp_path / "input.txt").write_text(LONG)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89PNG")
    refused(silicon("prepare", *words), *says)
    assert listing(home) in ([], ["data"])


RECORDS = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "broken.jsonl line 2", "not JSON"),
    "titles.jsonl": (b'{"title": "a", "n": 1}', "titles.jsonl line 1", "no field `text`; there are: title, n"),
    "number.json": (b"17", "number.json item 1", "a number, not a record with text"),
    "empty.jsonl": (b"", "empty.jsonl", "the file is empty"),
    "deep.json": (b"[" * 100_000, "deep.json item 1", "nested too deeply"),
    "bytes.jsonl": (b'{"text": "caf\xe9"}', "bytes.jsonl line 1", "byte 0xe9 at offset 13"),
    "nul.jsonl": (b'{"text": "\0"}', "nul.jsonl line 1", "invalid control character at character 11"),
    "chat.jsonl": (b'{"messages": []}', "chat.jsonl line 1", "the conversation is empty"),
    "rows.parquet": (b"PAR1", "rows.parquet", "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_cannot_be_used(silicon: Silicon, home: Path, tmp_path: Path, name: str) -> None:
    content, where, what = RECORDS[name]
    (tmp_path / name).write_bytes(content)
    refused(silicon("prepare", name), what, where)
    assert listing(home) in ([], ["data"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prepare", "plays", "--write", "nanogtp", "--output", "out"], ["--write nanogtp is not known", "nanogpt?"]),
        (["prepare", "plays", "--write", "nanogpt"], ["--write takes one dataset and --output", "--output DIR"]),
        (["prepare", "--output", "out"], ["--write takes one dataset and --output"]),
        (["prepare", "plays", "--write", "llmc", "--output", "."], ["the folder exists (.)"]),
        (
            ["prepare", "plasy", "--write", "llmc", "--output", "out"],
            ["no dataset named 'plasy'", "Did you mean plays?"],
        ),
        (["tokenizer", "plasy"], ["no dataset, run or file named 'plasy'", "Did you mean plays?"]),
        (["tokenizer", "plays.txt"], ["not a usable tokenizer.json"]),
    ],
)
def test_writing_and_showing_what_is_not_there(
    silicon: Silicon, trained: Trained, tmp_path: Path, words: list[str], says: list[str]
) -> None:
    (tmp_path / "plays.txt").write_text(LONG)
    refused(silicon(*words), *says)
    assert not (tmp_path / "out").exists()


def test_a_dataset_is_never_replaced_unasked(silicon: Silicon, own: Trained, tmp_path: Path) -> None:
    before = own.files()
    (tmp_path / "other.txt").write_text(LONG)
    refused(
        silicon("prepare", "other.txt", "--name", "plays"),
        "dataset plays exists and was made from other text",
        "--force",
    )
    refused(silicon("prepare", own.text, "--name", "plays"), "made with another tokenizer", "--name OTHER")
    assert own.files() == before
    assert silicon("prepare", "other.txt", "--name", "plays", "--force").code == 0
    assert sorted(os.listdir(own.home / "data")) == ["plays"]


# --- words and values of train ---------------------------------------------------------------------------------------

TRAIN = {
    "unknown preset": (["--preset", "tny"], ["no preset named tny", "Did you mean tiny?"]),
    "preset file missing": (["--preset", "my.toml"], ["no such file (my.toml)"]),
    "unknown profile": (["--profile", "atuo"], ["no profile named atuo"]),
    "mistyped key": (["--set", "train.save_evry=5"], ["unknown setting train.save_evry (--set)", "train.save_every?"]),
    "key without section": (
        ["--set", "save_every=5"],
        ["unknown setting save_every", "Did you mean train.save_every?"],
    ),
    "set without value": (["--set", "train.save_every"], ["'train.save_every' has no value", "train.save_every=100"]),
    "bad value": (["--set", "train.save_every=often"], ["train.save_every = 'often'", "valid integer", "(--set)"]),
    "out of bounds": (["--set", "train.warmup=2"], ["train.warmup = 2", "less than or equal to 1"]),
    "no steps": (["--steps", "0"], ["train.steps = 0", "greater than or equal to 1", "(--steps"]),
    "garbage time": (["--time", "soon"], ["train.time = 'soon'", "90s, 30m, 2h or 1h30m", "(--time"]),
    "two budgets": (["--steps", "5", "--time", "1m"], ["train.steps and train.time are both given", "--steps --time"]),
    "garbage moment": (["--until", "25:00"], ["train.until = '25:00'", "07:00 or 2026-11-22 07:00", "(--until"]),
    "moment that is past": (["--until", "2020-01-01 07:00"], ["'2020-01-01 07:00': it is past", "(--until"]),
    "two budgets, one by the clock": (
        ["--until", "07:00", "--time", "1m"],
        ["train.time and train.until are both given; a run has one budget", "--time --until"],
    ),
    "bad seed": (["--seed", "-1"], ["train.seed = -1"]),
    "batch that does not divide": (["--set", "machine.micro_batch=3"], ["micro_batch 3 does not divide the 2", "1, 2"]),
    "tokens that do not divide": (["--set", "train.tokens_per_step=65"], ["65 is not a multiple of model.context 32"]),
    "too few heads": (["--set", "model.n_kv_head=3"], ["n_head 1 is not a multiple of n_kv_head 3"]),
    "unknown dataset": (["--data", "palys"], ["no dataset named 'palys'", "Did you mean plays?"]),
    "absent device": (["--device", ABSENT], [f"device {ABSENT} is not available: ", "Use --device "]),
    "unknown device": (["--device", "gpu"], ["machine.device = 'gpu'", "'auto', 'cuda', 'mps' or 'cpu'", "--device"]),
    "context longer than the data": (
        ["--set", "model.context=65536", "--set", "train.tokens_per_step=65536", "--set", "machine.micro_batch=1"],
        ["context 65536 is longer than the training data (", "--set model.context=", "train.bin"],
    ),
    "vocabulary too small": (["--set", "model.vocab_size=3"], ["model.vocab_size 3 is less than the tokenizer's"]),
    "run name in use": (["--name", "whole"], ["run whole exists", "runs/whole)", "silicon resume whole"]),
    "run name with a slash": (["--name", "a/b"], ["'a/b' is no run name", "letters, digits"]),
    "run name that hides": (["--name", ".hidden"], ["'.hidden' is no run name"]),
    "a model beyond any memory": (["--set", f"model.n_ff={2**44}"], ["out of memory", "--preset"]),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(silicon: Silicon, own: Trained, case: str) -> None:
    words, says = TRAIN[case]
    before = own.files()
    done = silicon("train", "--data", "plays", "--preset", own.preset, "--steps=9", *words)
    if "--time" in words or "--until" in words:
        done = silicon("train", "--data", "plays", "--preset", own.preset, *words)
    refused(done, *says)
    made = own.files().keys() - before.keys()
    assert {name: own.files()[name] for name in before} == before
    # only a run that had begun may remain, and it can be resumed once the cause is gone
    assert not made or case == "a model beyond any memory", made


def test_wrong_words_are_found_before_anything_is_prepared(silicon: Silicon, home: Path) -> None:
    refused(silicon("train", "--preset", "tny"), "no preset named tny")
    refused(silicon("train", "--name", "a/b"), "'a/b' is no run name")
    refused(silicon("train", "--dry-run", "--set", "x=1"), "unknown setting x")
    assert not home.exists()


def test_several_datasets_and_none_chosen(silicon: Silicon, own: Trained, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(LONG)
    assert silicon("prepare", "other.txt").code == 0
    refused(silicon("train", "--steps", "1"), "there are several datasets", "Type --data and one of: other, plays.")


# --- runs that are not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["resume"], ["sample", "To be"], ["eval"]])
def test_no_run_yet(silicon: Silicon, home: Path, words: list[str]) -> None:
    refused(silicon(*words), "there is no run yet", home / "runs", "Type silicon train.")
    assert not home.exists()


@pytest.mark.parametrize("words", [["resume", "whoel"], ["sample", "To be", "--run", "whoel"], ["eval", "whoel"]])
def test_an_unknown_run_suggests_the_nearest(silicon: Silicon, trained: Trained, words: list[str]) -> None:
    refused(silicon(*words), "no run named whoel", "Did you mean whole?")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "-1"], ["--temperature -1", "greater than or equal to 0"]),
        (["--top-p", "0"], ["--top-p 0", "greater than 0"]),
        (["--min-p", "1"], ["--min-p 1", "less than 1"]),
        (["--top-k", "-3"], ["--top-k -3"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty 0"]),
        (["--max-tokens", "0"], ["--max-tokens 0"]),
        (["--num-samples", "0"], ["--num-samples 0"]),
        (["--seed", "-5"], ["--seed -5"]),
        (["--step", "5"], ["run whole has no step 5", "There are: 4, 8."]),
        (["--step", "last"], ["--step last is neither a number nor best"]),
        (["--device", ABSENT], [f"device {ABSENT} is not available", "silicon doctor"]),
        (["--device", "gpu"], ["machine.device = 'gpu'", "(--device)"]),
        (
            ["ü and 🙂"],
            ["the model's tokenizer has no 'ü' (U+00FC), '🙂' (U+1F642)", "--tokenizer byte"],
        ),
    ],
)
def test_sample_refuses(silicon: Silicon, trained: Trained, words: list[str], says: list[str]) -> None:
    refused(silicon("sample", *words, "--run", "whole"), *says)


def test_doctor_refuses_a_device_that_is_not_there(silicon: Silicon) -> None:
    refused(silicon("doctor", "--device", ABSENT), f"device {ABSENT} is not available")
    refused(silicon("doctor", "--device", "gpu"), "machine.device = 'gpu'")


def test_other_commands_refuse(silicon: Silicon, own: Trained, tmp_path: Path) -> None:
    refused(silicon("probe-batch", "--limit", "soon"), "--limit soon", "90s, 30m")
    refused(silicon("resume", "whole", "--extend", "soon"), "--extend soon", "90s, 30m")
    refused(silicon("resume", "whole", "--extend", "0"), "--extend 0", "more than nothing")
    refused(silicon("resume", "whole", "--extend", "9" * 400), "--extend 999", "finite")
    refused(silicon("profile", "--preset", "tny"), "Did you mean tiny?")
    refused(silicon("profile", "--data", "palys"), "no dataset named 'palys'", "Did you mean plays?")
    refused(silicon("settings", "trian"), "no section trian", "Did you mean train?")
    folder = own.checkpoints("whole")[0]
    refused(silicon("eval", folder), "a model folder has no dataset of its own", "Type --data NAME.")
    (tmp_path / "other.txt").write_text(LONG)
    assert silicon("prepare", "other.txt").code == 0
    refused(silicon("eval", "whole", "--data", "other"), "dataset other was made with another tokenizer", "--tokenizer")
    (folder / "model.safetensors").unlink()
    refused(silicon("sample", "To be", "--run", folder), "no model.safetensors", folder)


# --- damaged data ----------------------------------------------------------------------------------------------------


def flipped(at: float) -> Callable[[bytes], bytes]:
    """One bit changed, at a share of the file's length."""

    def flip(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flip


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without(*path: str) -> Callable[[bytes], bytes]:
    """A JSON file with one entry taken out."""

    def take_out(data: bytes) -> bytes:
        whole = json.loads(data)
        inner = whole
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return json.dumps(whole).encode()

    return take_out


DATA = {
    "a flipped bit in the tokens": ("train.bin", flipped(0.9)),
    "a flipped bit in the validation tokens": ("val.bin", flipped(0.99)),
    "a flipped bit in the header": ("train.bin", flipped(0.0)),
    "cut tokens": ("train.bin", cut),
    "an empty file": ("val.bin", lambda data: b""),
    "an odd byte more": ("train.bin", lambda data: data + b"\0"),
    "a cut card": ("dataset.json", cut),
    "a card of another kind": ("dataset.json", lambda data: b"[]"),
    "a card that is not text": ("dataset.json", lambda data: b"\xff" + data),
    "a card without its tokenizer": ("dataset.json", without("tokenizer", "kind")),
    "a card without a hash": ("dataset.json", without("tokenizer", "sha256")),
    "a card without a split": ("dataset.json", without("splits", "val")),
    "a card without a count": ("dataset.json", without("splits", "val", "bytes")),
    "a cut tokenizer": ("tokenizer.json", cut),
    "a tokenizer that is not text": ("tokenizer.json", flipped(0.5)),
    "another tokenizer": ("tokenizer.json", lambda data: data.replace(b'"e"', b'"E"', 1)),
}


@pytest.mark.parametrize("case", DATA)
def test_a_damaged_dataset_is_named_and_no_run_begins(silicon: Silicon, own: Trained, case: str) -> None:
    name, damage = DATA[case]
    path = own.home / "data" / "plays" / name
    good = path.read_bytes()
    assert damage(good) != good
    path.write_bytes(damage(good))
    before = own.files()
    words = ["train", "--data", "plays", "--preset", own.preset, "--steps", "2", "--name", "mine"]
    refused(silicon(*words), f"plays/{name}", "--name plays", "--force")
    assert own.files() == before
    path.write_bytes(good)
    assert silicon(*words).code == 0, "the name is still free"


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "dataset.json", "tokenizer.json"])
def test_a_dataset_with_a_file_missing(silicon: Silicon, own: Trained, name: str) -> None:
    (own.home / "data" / "plays" / name).unlink()
    refused(silicon("train", "--data", "plays", "--preset", own.preset), f"plays/{name}")
    assert not (own.home / "runs" / "plays-mini").exists()


def test_a_run_is_not_resumed_on_other_data(silicon: Silicon, own: Trained, tmp_path: Path) -> None:
    run_file = own.home / "runs" / "cut" / "run.toml"
    (tmp_path / "other.txt").write_text(own.text.read_text().replace("the", "The"))
    assert silicon("prepare", "other.txt", "--name", "other", "--tokenizer", "char").code == 0
    other = own.home / "data" / "other"
    run_file.write_text(run_file.read_text().replace(str(own.text.parent / "home" / "data" / "plays"), str(other)))
    assert str(other) in run_file.read_text()
    refused(silicon("resume", "cut"), "the dataset is not the one this run was trained on", "start a new run")


# --- damaged runs ----------------------------------------------------------------------------------------------------

CHECKPOINT = {
    "a flipped weight": ("model.safetensors", flipped(0.9)),
    "cut weights": ("model.safetensors", cut),
    "a flipped optimiser state": ("optimizer.safetensors", flipped(0.9)),
    "a cut state": ("state.json", cut),
    "an altered config": ("config.json", lambda data: data.replace(b"32", b"33", 1)),
    "a cut tokenizer": ("tokenizer.json", cut),
    "a cut manifest": ("MANIFEST.json", cut),
    "an empty manifest": ("MANIFEST.json", lambda data: b""),
    "a manifest that is not text": ("MANIFEST.json", lambda data: b"\xff\xfe" + data),
}


@pytest.mark.parametrize("case", CHECKPOINT)
def test_a_damaged_newest_checkpoint_is_passed_by_and_said_so(silicon: Silicon, own: Trained, case: str) -> None:
    name, damage = CHECKPOINT[case]
    newest, older = own.checkpoints("cut")
    path = newest / name
    good = path.read_bytes()
    assert damage(good) != good
    path.write_bytes(damage(good))
    used = silicon("sample", "To be", "--run", "cut", "--max-tokens", "3", "--seed", "1")
    assert used.code == 0 and used.out.startswith("To be")
    needed = name not in ("optimizer.safetensors", "state.json")
    assert ("skipped step-000000006" in used.told) == needed, "only what sampling reads must be whole"
    done = silicon("resume", "cut")
    assert done.code == 0 and "skipped step-000000006" in done.told and "resumed from step 4" in done.told
    assert done.out.startswith("run cut is done: step 8") and older.is_dir()


def test_no_whole_checkpoint_is_an_error_that_loses_nothing(silicon: Silicon, own: Trained) -> None:
    for folder in own.checkpoints("cut"):
        path = folder / "model.safetensors"
        path.write_bytes(flipped(0.9)(path.read_bytes()))
    before = own.files()
    for words in (["resume", "cut"], ["sample", "To be", "--run", "cut"], ["eval", "cut"]):
        refused(
            silicon(*words),
            "no checkpoint of cut is whole",
            "step-000000006",
            "step-000000004",
            own.home / "runs" / "cut",
        )
    refused(silicon("sample", "To be", "--run", "cut", "--step", "4"), "model.safetensors")
    assert own.files() == before


def test_a_damaged_newer_checkpoint_costs_no_good_one(tmp_path: Path) -> None:
    """Retention counts from the step just saved: one that a resume passed by neither counts nor stops the save."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run = RunFolder(tmp_path / "run")

    def save(step: int) -> None:
        run.save(step, None, {"state.json": b"{}"}, {"model.safetensors": {"w": torch.ones(2)}}, keep=2)

    for step in (1, 2, 9):
        save(step)
    (run.path / "checkpoints" / "step-000000009" / "state.json").write_bytes(b"{]")
    save(3)
    assert [path.name for path in run.checkpoints()] == ["step-000000009", "step-000000003", "step-000000002"]
    assert run.newest()[0].step == 3


RUN_FILE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "no TOML": lambda text: text.replace("=", "", 1),
    "cut": lambda text: text[: text.index("[sources]")],
    "without its facts": lambda text: text.replace("[about]", "[bout]"),
    "a value that cannot be": lambda text: text.replace("n_layer = 1", "n_layer = 0"),
    "an unknown setting": lambda text: text.replace("n_layer = 1", "n_lyer = 1"),
}


@pytest.mark.parametrize("case", RUN_FILE)
def test_a_damaged_run_file(silicon: Silicon, own: Trained, case: str) -> None:
    path = own.home / "runs" / "cut" / "run.toml"
    good = path.read_text()
    path.write_text(RUN_FILE[case](good))
    assert path.read_text() != good
    refused(silicon("resume", "cut"), path)
    refused(silicon("eval", "cut"), path)
    states = {row["run"]: row["state"] for row in silicon("runs", "--json").json()["runs"]}
    assert states["cut"].startswith("damaged: ") and states["whole"] == "done"


def test_a_run_in_use(silicon: Silicon, own: Trained) -> None:
    with open(own.home / "runs" / "cut" / ".lock", "a+") as held:
        held.truncate(0)
        held.write("process 7 on elsewhere\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(silicon("resume", "cut"), "run cut is in use by process 7 on elsewhere", "Wait for it, or stop it.")
        assert silicon("sample", "To be", "--run", "cut", "--max-tokens", "2").code == 0, "reading needs no lock"
    assert silicon("resume", "cut").code == 0


# --- a home that cannot be written -----------------------------------------------------------------------------------


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the right to write everywhere, where the tests run as root."""
    if os.geteuid():
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home in a folder that anyone may enter and nobody write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    monkeypatch.setenv("SILICON_HOME", str(folder / "home"))
    monkeypatch.chdir("/")
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_an_unwritable_home(silicon: Silicon, locked: Path) -> None:
    words = ["SILICON_HOME", "Permission denied", locked]
    with as_nobody():
        prepared = silicon("prepare")
        trained = silicon("train", "--steps", "1")
        report = silicon("doctor", "--json")
        listed = silicon("runs")
    refused(prepared, *words)
    refused(trained, *words)
    assert listed.out == "no runs yet: silicon train\n"
    failing = [check for check in report.json()["checks"] if check["status"] == "fail"]
    assert report.code == 1 and any("SILICON_HOME" in check["remedy"] for check in failing)
    assert listing(locked) == []


def test_a_home_that_is_a_file(silicon: Silicon, home: Path) -> None:
    home.write_text("not a folder")
    refused(silicon("prepare"), "Not a directory", home, "SILICON_HOME")
    refused(silicon("train", "--steps", "1"), "Not a directory", "SILICON_HOME")
    assert silicon("runs").out == "no runs yet: silicon train\n"
    assert home.read_text() == "not a folder"


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB, where the tests may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small disk: " + made.stderr.decode().strip())
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path, leave: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - leave))
    return filler


def test_a_full_disk_loses_nothing(
    silicon: Silicon, own: Trained, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = small_disk / "home"
    shutil.copytree(own.home, home)
    monkeypatch.setenv("SILICON_HOME", str(home))
    on_disk = type(own)(home, own.text, own.preset)
    filler = fill(small_disk, leave=100 << 10)
    before = on_disk.files()

    refused(silicon("prepare", "builtin"), "No space left on device", "Free some space")
    assert on_disk.files() == before, "no half of a dataset"

    refused(silicon("resume", "cut"), "No space left on device", "Free some space and type silicon resume")
    whole = {name: data for name, data in on_disk.files().items() if not name.startswith("runs/cut/log")}
    assert whole == {name: data for name, data in before.items() if not name.startswith("runs/cut/log")}

    filler.unlink()
    done = silicon("resume", "cut")
    assert done.code == 0 and done.out.startswith("run cut is done: step 8"), "it goes on once there is space"


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file of this process may grow beyond 40 kB: what a quota or a disk error does in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_nothing(silicon: Silicon, own: Trained, short_files: None) -> None:
    before = own.files()
    refused(silicon("prepare", "builtin"), "File too large")
    refused(silicon("resume", "cut"), "File too large")
    after = own.files()
    assert {name for name in after if ".tmp" in name} == set()
    assert {name: after[name] for name in before if "log.jsonl" not in name} == {
        name: data for name, data in before.items() if "log.jsonl" not in name
    }


def test_an_error_is_one_error_whatever_its_words() -> None:
    """`str` is what logs and other programs see."""
    assert str(SiliconError("what", where="where", fix="Type this.")) == "what (where). Type this."
    assert str(SiliconError("what")) == "what"
