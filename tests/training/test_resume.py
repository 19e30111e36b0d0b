"""Exact resume through the command line: a run cut by any signal ends with the bytes of a straight one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from siliconlm import engine
from siliconlm.errors import SiliconError
from siliconlm.events import Notice
from siliconlm.training.checkpoint import RunFolder, read_log

STEPS, CUT = 24, 20
SETTINGS = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "n_ff": 24, "context": 16}
ARGUMENTS = [f"--set=model.{name}={value}" for name, value in SETTINGS.items()]
ARGUMENTS += ["--set=model.dropout=0.1", "--set=train.tokens_per_step=128", "--set=train.save_every=4"]
ARGUMENTS += ["--set=machine.micro_batch=4", "--set=machine.threads=1", "--device=cpu", "--profile=none"]
TEXT = "".join(f"{n}: the {n * 7 % 11} ships sail on, and {n * n % 97} gulls cry “naïve”.\n" for n in range(70))
LOGGED = ("step", "tokens", "loss", "grad_norm", "lr")


@dataclass
class Silicon:
    """The command line with a home of its own."""

    home: Path

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        environment = {**os.environ, "SILICON_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        return [sys.executable, "-m", "siliconlm", *arguments], environment

    def __call__(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """The events of a command that is left alone."""
        command, environment = self.command(*arguments)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    @contextmanager
    def started(self, *arguments: str) -> Iterator[Talk]:
        command, environment = self.command(*arguments)
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, bufsize=1) as process:
            assert process.stdout and process.stderr
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
            try:
                yield Talk(process, process.stdout, process.stderr)
            finally:
                process.kill()

    def train(self, name: str, *more: str) -> tuple[str, ...]:
        return ("train", "--data=verse", f"--steps={STEPS}", f"--name={name}", *ARGUMENTS, *more, "--json")

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.home / "runs" / name)


@dataclass
class Talk:
    """A training process that cannot run ahead: it waits when its few unread lines fill the small pipe."""

    process: subprocess.Popen[str]
    stdout: IO[str]
    stderr: IO[str]

    def until_saved(self, step: int) -> None:
        for line in self.stdout:
            event = json.loads(line)
            if event["event"] == "saved" and event["step"] >= step:
                return
        raise AssertionError(f"it ended before step {step}: {self.stderr.read()}")

    def finish(self) -> int:
        self.stdout.read()
        return self.process.wait(60)


@pytest.fixture(scope="module")
def silicon(tmp_path_factory: pytest.TempPathFactory) -> Silicon:
    """A home with a small dataset and a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "verse.txt").write_text(TEXT, encoding="utf-8")
    silicon = Silicon(folder / "home")
    silicon("prepare", str(folder / "verse.txt"), "--json")
    silicon(*silicon.train("straight"))
    return silicon


@pytest.fixture
def copy(silicon: Silicon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Silicon:
    """The same home somewhere else, to be harmed."""
    shutil.copytree(silicon.home, tmp_path / "copied")
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "copied"))
    return Silicon(tmp_path / "copied")


def logged(run: RunFolder) -> list[tuple[Any, ...]]:
    return [tuple(event[key] for key in LOGGED) for event in read_log(run) if event["event"] == "step"]


def evaluated(run: RunFolder) -> list[tuple[Any, ...]]:
    keys = ("step", "val_loss", "val_bpb", "tokens", "complete")
    return [tuple(event[key] for key in keys) for event in read_log(run) if event["event"] == "evaluated"]


def assert_same_run(run: RunFolder, straight: RunFolder) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (each.at_step(STEPS).path / name for each in (run, straight))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert logged(run) == logged(straight) and evaluated(run) == evaluated(straight) != []
    assert [line[0] for line in logged(straight)] == list(range(1, STEPS + 1))
    assert run.at_step(STEPS).manifest["val_loss"] == straight.at_step(STEPS).manifest["val_loss"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=str,
)
def test_a_run_that_is_cut_and_resumed_is_the_straight_run(silicon: Silicon, number: int, code: int) -> None:
    name = f"cut-{int(number)}"
    with silicon.started(*silicon.train(name)) as talk:
        talk.until_saved(8)
        talk.process.send_signal(number)
        assert talk.finish() == code
    run = silicon.run(name)
    cut_at = run.newest()[0].step
    assert 8 <= cut_at < STEPS, "it was cut in the middle"
    if number != signal.SIGKILL:
        last = read_log(run)[-1]
        assert (last["event"], last["step"], last["reason"]) == ("finished", cut_at, signal.Signals(number).name)
    events = silicon("resume", name, "--json")
    assert next(event["step"] for event in events if event["event"] == "resumed") == cut_at
    assert events[-1]["event"] == "finished" and events[-1]["reason"] == "done"
    assert_same_run(run, silicon.run("straight"))


@pytest.mark.slow
def test_two_kills_and_an_average_come_back_as_well(silicon: Silicon) -> None:
    more = ("--set=train.ema=0.8", "--set=optim.name=adamw")
    silicon(*silicon.train("ema-straight", *more))
    with silicon.started(*silicon.train("ema-cut", *more)) as talk:
        talk.until_saved(4)
        talk.process.kill()
        assert talk.finish() == -9
    with silicon.started("resume", "ema-cut", "--json") as talk:
        talk.until_saved(12)
        talk.process.kill()
        assert talk.finish() == -9
    silicon("resume", "ema-cut", "--json")
    run, straight = silicon.run("ema-cut"), silicon.run("ema-straight")
    assert_same_run(run, straight)
    raw = [each.at_step(STEPS).path / "train.safetensors" for each in (run, straight)]
    assert raw[0].read_bytes() == raw[1].read_bytes()
    assert raw[0].read_bytes() != (run.at_step(STEPS).path / "model.safetensors").read_bytes()


def test_a_second_ctrl_c_stops_at_once(silicon: Silicon) -> None:
    with silicon.started(*silicon.train("impatient")) as talk:
        talk.until_saved(6)
        talk.process.send_signal(signal.SIGINT)
        while "once more stops at once" not in (line := talk.stderr.readline()):
            assert line, "the first Ctrl-C was not answered"
        talk.process.send_signal(signal.SIGINT)
        assert talk.process.wait(30) == -signal.SIGINT, "though nobody reads what it wants to say"
    assert read_log(silicon.run("impatient"))[-1]["event"] != "finished"
    assert silicon.run("impatient").newest()[0].step >= 6


def test_resuming_a_finished_run_says_so_and_changes_nothing(copy: Silicon) -> None:
    run = copy.run("straight")
    before = {path: path.read_bytes() for path in run.path.glob("checkpoints/*/*")}
    events = copy("resume", "straight", "--json")
    assert any(event["event"] == "notice" and "has used its budget" in event["message"] for event in events)
    assert events[-1]["event"] == "finished" and events[-1]["step"] == STEPS
    assert not any(event["event"] in ("step", "saved") for event in events)
    assert {path: path.read_bytes() for path in run.path.glob("checkpoints/*/*")} == before
    assert logged(run) == logged(copy.run("straight"))


# --- what is refused, in this process --------------------------------------------------------------------------------


def cut_back(run: RunFolder, step: int) -> None:
    """As if the run had been killed after this checkpoint."""
    for path in run.checkpoints():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def resume(name: str) -> list[Any]:
    return list(engine.resume(name))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def prepare_other_text(silicon: Silicon) -> None:
    other = silicon.home / "verse.txt"
    other.write_text(TEXT.replace("gulls", "terns"), encoding="utf-8")
    list(engine.prepare([str(other)], "verse", force=True))


CHANGES: dict[str, Callable[[Silicon], object]] = {
    "a flipped bit in the training tokens": lambda it: flip(it.home / "data" / "verse" / "train.bin", -1),
    "a flipped bit in the validation tokens": lambda it: flip(it.home / "data" / "verse" / "val.bin", -1),
    "a token file cut short": lambda it: os.truncate(it.home / "data" / "verse" / "train.bin", 5000),
    "another tokenizer": lambda it: flip(it.home / "data" / "verse" / "tokenizer.json", 2),
    "other text of the same length": prepare_other_text,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_is_refused(copy: Silicon, change: str) -> None:
    run = copy.run("straight")
    cut_back(run, CUT)
    # The run remembers where its data was; make that the copy.
    settings = (run.path / "run.toml").read_text()
    lines = [line for line in settings.splitlines() if line.startswith("dataset = ")]
    (run.path / "run.toml").write_text(settings.replace(lines[0], f'dataset = "{copy.home / "data" / "verse"}"'))
    CHANGES[change](copy)
    with pytest.raises(SiliconError) as error:
        resume("straight")
    assert error.value.kind == "bad_data"
    assert run.newest()[0].step == CUT


def test_a_damaged_newest_checkpoint_is_told_and_made_again(copy: Silicon, silicon: Silicon) -> None:
    run = copy.run("straight")
    flip(run.at_step(STEPS).path / "optimizer.safetensors", -1)
    events = resume("straight")
    notices = [event for event in events if isinstance(event, Notice)]
    assert any(notice.level == "warning" and f"step-{STEPS:09d}" in notice.message for notice in notices)
    assert_same_run(run, silicon.run("straight"))


def test_other_settings_do_not_fit_the_checkpoint(copy: Silicon) -> None:
    run = copy.run("straight")
    cut_back(run, CUT)
    settings = (run.path / "run.toml").read_text()
    (run.path / "run.toml").write_text(settings.replace("n_ff = 24", "n_ff = 32"))
    with pytest.raises(SiliconError, match="another shape") as error:
        resume("straight")
    assert error.value.kind == "bad_data"


def test_a_run_in_use_is_not_resumed(copy: Silicon) -> None:
    with copy.run("straight").lock(), pytest.raises(SiliconError, match="in use") as error:
        resume("straight")
    assert error.value.kind == "run_in_use"
