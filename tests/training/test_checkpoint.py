"""A checkpoint exists whole or not at all: damage, kills, full disks, locks, retention, the log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siliconlm.config import RunConfig
from siliconlm.data.dataset import Dataset
from siliconlm.errors import SiliconError
from siliconlm.events import Evaluated, Notice, Resumed, Saved, Step
from siliconlm.hardware.device import Device
from siliconlm.training.checkpoint import RunFolder, create_run, free_run_name, read_checkpoint, read_log
from siliconlm.training.state import TrainState

Config = Callable[..., RunConfig]
FILES = ("config.json", "generation_config.json", "model.safetensors", "optimizer.safetensors", "state.json")
FILES += ("tokenizer.json", "tokenizer_config.json", "MANIFEST.json")


@pytest.fixture
def run(config: Config) -> RunFolder:
    return create_run("run", config(), {"dataset": "nowhere"})


def save(run: RunFolder, step: int, val_loss: float | None = None, keep: int = 3) -> Saved:
    """A checkpoint whose every number is its step."""
    tensors = {"model.safetensors": {"a": torch.full((8,), float(step))}}
    return run.save(step, val_loss, {"state.json": json.dumps({"step": step}).encode()}, tensors, keep)


def steps(run: RunFolder) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in run.checkpoints()]


def leftovers(run: RunFolder) -> list[str]:
    return sorted(path.name for path in [*run.path.glob(".t*-*"), *run.path.glob("checkpoints/.*")])


# --- what a checkpoint is --------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_was_saved(run: RunFolder) -> None:
    saved = save(run, 7, 1.5)
    checkpoint = run.at_step(7)
    assert (checkpoint.step, checkpoint.manifest["val_loss"], checkpoint.state()) == (7, 1.5, {"step": 7})
    assert torch.equal(checkpoint.tensors("model.safetensors")["a"], torch.full((8,), 7.0))
    assert saved.step == 7 and saved.path == str(checkpoint.path)
    assert saved.bytes == sum((checkpoint.path / name).stat().st_size for name in ("state.json", "model.safetensors"))
    assert sorted(path.name for path in checkpoint.path.iterdir()) == sorted(
        ["MANIFEST.json", "model.safetensors", "state.json"]
    )
    with pytest.raises(SiliconError, match=r"optimizer\.safetensors is not in this checkpoint"):
        checkpoint.tensors("optimizer.safetensors")


def test_a_copied_checkpoint_stays_valid(run: RunFolder, tmp_path: Path) -> None:
    save(run, 7)
    shutil.copytree(run.at_step(7).path, tmp_path / "elsewhere")
    read_checkpoint(tmp_path / "elsewhere").verify()


def test_a_checkpoint_of_a_newer_version_says_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siliconlm.training.checkpoint.FORMAT", 2)
    save(run, 7)
    monkeypatch.undo()
    with pytest.raises(SiliconError, match="newer SiliconLM") as error:
        read_checkpoint(run.checkpoints()[0])
    assert error.value.kind == "bad_data"


def test_saving_a_step_again_replaces_it(run: RunFolder) -> None:
    save(run, 7, 2.0)
    save(run, 7, 1.0)
    assert steps(run) == [7] and run.at_step(7).manifest["val_loss"] == 1.0 and leftovers(run) == []


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(config: Config, device: Device, dataset: Dataset) -> RunFolder:
    """Two whole checkpoints as training makes them."""
    settings = config()
    state = TrainState.new(settings, device)
    for weight in state.model.parameters():
        weight.grad = torch.ones_like(weight)
    for optimiser in state.optimisers:
        optimiser.step()
    run = create_run("real", settings, {"dataset": str(dataset.path)})
    for state.step in (10, 20):
        state.save(run, dataset.tokenizer, dataset.fingerprint)
    return run


def damages(size: int) -> dict[str, Callable[[Path], object]]:
    """Ways to harm a file of so many bytes, among them a flipped bit in its first, middle and last byte."""

    def flip(place: int) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(
            (data := path.read_bytes())[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        )

    flips = {f"flip {place}": flip(place) for place in {0, 1, 63, 64, 65, 66, size // 3, size // 2, size - 1}}
    return {
        **{name: harm for name, harm in flips.items() if int(name[5:]) < size},
        "delete": Path.unlink,
        "empty": lambda path: path.write_bytes(b""),
        "cut": lambda path: os.truncate(path, size - 1),
        "halve": lambda path: os.truncate(path, size // 2),
        "zeros": lambda path: path.write_bytes(bytes(size)),
        "grow": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "not text": lambda path: path.write_bytes(b"\xff" * size),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
    }


@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_found_and_the_older_checkpoint_used(real: RunFolder, name: str) -> None:
    newest = real.at_step(20).path
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    kept = real.path.parent / "kept"
    shutil.copytree(newest, kept)
    for what, harm in damages((newest / name).stat().st_size).items():
        harm(newest / name)
        checkpoint, skipped = real.newest()
        assert checkpoint.step == 10, what
        assert len(skipped) == 1 and newest.name in skipped[0] and name in skipped[0], what
        with pytest.raises(SiliconError, match="damaged") as error:
            real.at_step(20)
        assert error.value.kind == "bad_data" and name in error.value.where
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        assert real.newest() == (real.at_step(20), [])


def test_a_file_is_checked_again_when_it_is_read(real: RunFolder) -> None:
    """Whoever opens a file gets the bytes that were hashed, also when they changed after `verify`."""
    checkpoint = real.at_step(20)
    (checkpoint.path / "state.json").write_text(json.dumps({**checkpoint.state(), "step": 21}))
    model = bytearray((checkpoint.path / "model.safetensors").read_bytes())
    model[-1] ^= 1
    (checkpoint.path / "model.safetensors").write_bytes(model)
    with pytest.raises(SiliconError, match="damaged") as error:
        checkpoint.state()
    assert error.value.kind == "bad_data"
    with pytest.raises(SiliconError, match="SHA-256"):
        checkpoint.tensors("model.safetensors")


def test_with_no_whole_checkpoint_every_one_is_told(real: RunFolder) -> None:
    for step in (10, 20):
        (real.path / "checkpoints" / f"step-{step:09d}" / "state.json").unlink()
    with pytest.raises(SiliconError, match=r"step-000000020.*step-000000010") as error:
        real.newest()
    assert error.value.kind == "bad_data"


def test_a_run_without_a_checkpoint_says_so(run: RunFolder) -> None:
    with pytest.raises(SiliconError, match="no checkpoint yet") as error:
        run.newest()
    assert error.value.kind == "missing_input"


def test_a_step_is_never_substituted(run: RunFolder) -> None:
    for step in (5, 10):
        save(run, step)
    for absent in (0, 7, 11, 50):
        with pytest.raises(SiliconError, match=f"no step {absent}") as error:
            run.at_step(absent)
        assert error.value.kind == "missing_input" and "5, 10" in error.value.fix
    with pytest.raises(SiliconError, match="no evaluated checkpoint"):
        run.at_step("best")


def test_the_best_is_the_lowest_and_is_never_substituted(run: RunFolder) -> None:
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        save(run, step, val_loss, keep=9)
    best = run.at_step("best")
    assert best.step == 2
    (best.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SiliconError, match="damaged"):
        run.at_step("best")
    (best.path / "MANIFEST.json").unlink()
    assert run.at_step("best").step == 3, "one without a manifest was never there"


def test_other_folders_are_no_checkpoints(run: RunFolder) -> None:
    save(run, 5)
    for name in ("step-x", "step-", "step-5-copy", ".tmp-step-9", "step-9.tmp"):
        (run.path / "checkpoints" / name).mkdir()
    assert steps(run) == [5]


# --- retention -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep=st.integers(2, 4),
    losses=st.lists(st.one_of(st.none(), st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0])), max_size=9),
)
def test_the_newest_and_the_best_stay(run: RunFolder, keep: int, losses: list[float | None]) -> None:
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    best: tuple[float, int] | None = None
    for step, val_loss in enumerate(losses, start=1):
        before = set(steps(run))
        save(run, step, val_loss, keep)
        newest = set(range(max(1, step - keep + 1), step + 1))
        assert newest <= set(steps(run)) <= newest | before
        if val_loss is not None and (best is None or val_loss < best[0]):
            best = (val_loss, step)
        extra = set(steps(run)) - newest
        assert len(extra) <= 1
        if best:
            assert run.best().manifest["val_loss"] == best[0], "the lowest loss ever evaluated is still there"
    assert leftovers(run) == []


def test_nothing_is_deleted_for_a_new_checkpoint_that_is_not_good(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that reports success and loses bytes: the old ones must survive the new one's commit."""
    for step in (1, 2):
        save(run, step, keep=2)
    from siliconlm.training import checkpoint as module

    honest = module.write_tensors

    def lossy(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        facts = honest(path, tensors)
        os.truncate(path, facts["bytes"] - 1)
        return facts

    monkeypatch.setattr(module, "write_tensors", lossy)
    with pytest.raises(SiliconError, match="damaged"):
        save(run, 3, keep=2)
    assert {1, 2} <= set(steps(run)) and run.newest()[0].step == 2


# --- the lock --------------------------------------------------------------------------------------------------------


SAVER = """
import json, os, signal, subprocess, sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from siliconlm.training.checkpoint import RunFolder
torch.set_num_threads(1)
run = RunFolder(Path(sys.argv[1]))

def save(step):
    tensors = {"model.safetensors": {"a": torch.full((40_000,), float(step))}}
    tensors["optimizer.safetensors"] = {f"b{n}": torch.full((500,), float(step)) for n in range(20)}
    run.save(step, None, {"state.json": json.dumps({"step": step}).encode()}, tensors, 2)

def save_forever():
    with run.lock():
        step = run.newest()[0].step
        while True:
            step += 1
            save(step)
            with open(run.path / "acknowledged", "a") as file:
                file.write(f"{step}\\n")

def hold():
    with run.lock():
        subprocess.Popen(["cat"], close_fds=False)  # outlives its parent; ends with our standard input
        print("held", flush=True)
        signal.pause()

for line in sys.stdin:  # torch is imported once, and each child is a fork
    child = os.fork()
    if child == 0:
        {"save": save_forever, "hold": hold}[line.strip()]()
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@dataclass
class Forks:
    """Child processes that write a run, each ended by kill -9."""

    stdin: IO[str]
    stdout: IO[str]

    def start(self, what: str) -> int:
        self.stdin.write(what + "\n")
        self.stdin.flush()
        lines = [self.stdout.readline().strip() for _ in range(2 if what == "hold" else 1)]
        return int(next(line for line in lines if line.isdigit()))

    def kill(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        assert self.stdout.readline().strip() == "gone"


@pytest.fixture
def forks(run: RunFolder) -> Iterator[Forks]:
    command = [sys.executable, "-c", SAVER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        yield Forks(process.stdin, process.stdout)
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_second_process_is_told_that_the_run_is_in_use(run: RunFolder, forks: Forks) -> None:
    holder = forks.start("hold")
    with pytest.raises(SiliconError, match="run run is in use") as error, run.lock():
        pass
    assert error.value.kind == "run_in_use" and str(holder) in error.value.what
    save(run, 1)  # (this test is no polite process)
    assert run.newest()[0].step == 1, "reading needs no lock"
    forks.kill(holder)
    with run.lock():
        pass  # it died with its holder, though a grandchild lives on


def test_the_lock_is_free_after_the_block_and_after_an_error(run: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    with run.lock(), pytest.raises(SiliconError, match="in use"), run.lock():
        pass
    with run.lock():
        pass


def test_leftovers_are_swept_under_the_lock_only(run: RunFolder) -> None:
    save(run, 1)
    for folder in (run.path, run.path / "checkpoints"):
        (folder / ".tmp-step-000000002.aa" / "deep").mkdir(parents=True)
        (folder / ".tmp-step-000000002.aa" / "model.safetensors").write_bytes(b"half")
        (folder / ".trash-step-000000000.bb").mkdir()
        (folder / ".tmp-run.toml.cc").write_bytes(b"half")
    run.newest()
    assert len(leftovers(run)) == 6
    with run.lock():
        assert leftovers(run) == []
    assert steps(run) == [1] and (run.path / "run.toml").is_file()


def condition(run: RunFolder, which: int) -> Callable[[], bool]:
    """Moments to strike at: in the middle of a save, before its manifest or after, in a removal, after some saves."""
    folder = run.path / "checkpoints"
    said = run.path / "acknowledged"
    before = len(said.read_text().splitlines()) if said.is_file() else 0
    return [
        lambda: any(folder.glob(".tmp-*")),
        lambda: any(folder.glob(".tmp-*/optimizer.safetensors")),
        lambda: any(folder.glob(".tmp-*/MANIFEST.json")),
        lambda: any(folder.glob(".trash-*")),
        lambda: said.is_file() and len(said.read_text().splitlines()) > before + which % 3,
    ][which % 5]


def strike(run: RunFolder, forks: Forks, times: int) -> int:
    """Kill a saving process so often; returns in how many cases it left something half done."""
    interrupted = 0
    for which in range(times):
        reached = condition(run, which)
        child = forks.start("save")
        deadline = time.monotonic() + 30
        while not reached():
            assert time.monotonic() < deadline, f"moment {which % 5} never came"
        forks.kill(child)
        interrupted += bool(leftovers(run))
        said = (run.path / "acknowledged").read_text().split() if (run.path / "acknowledged").is_file() else ["1"]
        checkpoint, skipped = run.newest()
        assert skipped == [], "what has the name of a checkpoint is whole"
        assert checkpoint.step >= int(said[-1]), "what was told as saved is there"
        for name in checkpoint.manifest["files"].keys() - {"state.json"}:
            assert all((tensor == checkpoint.step).all() for tensor in checkpoint.tensors(name).values())
        assert len(steps(run)) <= 4
    return interrupted


def test_a_kill_at_any_moment_leaves_a_whole_newest_checkpoint(run: RunFolder, forks: Forks) -> None:
    save(run, 1)
    assert strike(run, forks, 30) >= 3, "some of them hit in the middle"


@pytest.mark.slow
def test_many_kills(run: RunFolder, forks: Forks) -> None:
    save(run, 1)
    assert strike(run, forks, 1000) >= 100


# --- a full disk -----------------------------------------------------------------------------------------------------


FULL = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from siliconlm.errors import from_os_error
from siliconlm.training.checkpoint import RunFolder
run = RunFolder(Path(sys.argv[1]))
with run.lock():
    # Python ignores SIGXFSZ, so that a write beyond the limit fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        run.save(2, 0.5, {"state.json": b"{}"}, {"model.safetensors": {"a": torch.ones(100_000)}}, 2)
    except OSError as error:
        print(from_os_error(error, "saving").kind)
"""


@pytest.mark.parametrize("limit", [1, 300_000], ids=["in the first file", "in the weights"])
def test_a_write_that_fails_leaves_the_older_checkpoint_and_nothing_else(run: RunFolder, limit: int) -> None:
    save(run, 1, 1.0)
    shown = subprocess.run(
        [sys.executable, "-c", FULL, str(run.path), str(limit)], capture_output=True, text=True, timeout=60
    )
    assert (shown.stdout.strip(), shown.returncode) == ("io_error", 0), shown.stderr
    assert steps(run) == [1] and leftovers(run) == []
    assert torch.equal(run.newest()[0].tensors("model.safetensors")["a"], torch.full((8,), 1.0))


def test_too_little_space_is_told_before_anything_is_written(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    usage = shutil.disk_usage(run.path)._replace(free=20 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SiliconError, match=r"No space left.*needs 40 MB, 21 MB are free") as error:
        run.save(2, None, {}, {"model.safetensors": {"a": torch.empty(10_000_000)}}, 2)
    assert error.value.kind == "io_error"
    assert steps(run) == [1] and leftovers(run) == []


# --- the run folder and its log --------------------------------------------------------------------------------------


def test_a_run_folder_appears_whole_with_its_settings(config: Config, home: Path) -> None:
    settings = config(train__seed=5)
    run = create_run("mine", settings, {"dataset": "there"})
    read, about = run.config()
    assert read == settings and read.sources == settings.sources
    assert about["dataset"] == "there" and about["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in (home / "runs").iterdir()) == ["mine"]


def test_a_name_is_taken_once_and_must_be_one(config: Config, run: RunFolder) -> None:
    with pytest.raises(SiliconError, match="run run exists") as error:
        create_run("run", config(), {})
    assert error.value.kind == "cannot_create"
    for name in ("", ".", "..", "a/b", "../x", "-x", ".hidden", "a b", "x" * 101, "a\n"):
        with pytest.raises(SiliconError, match="is no run name"):
            create_run(name, config(), {})
    assert free_run_name("other") == "other" and free_run_name("run") == "run-2"


def step_event(step: int, loss: float = 1.0) -> Step:
    return Step(step, 128 * step, loss, 0.5, 1.0)


def test_the_log_leaves_out_what_a_resume_took_back(run: RunFolder) -> None:
    for event in (step_event(1), step_event(2), Saved(2, "", 0, 0.0), step_event(3, 9.0), step_event(4, 9.0)):
        run.log(event)
    run.log(Resumed(2, ""))
    for event in (step_event(3), Evaluated(3, 1.0, 1.0, 5, True), step_event(4), step_event(5, 9.0)):
        run.log(event)
    run.log(Resumed(4, ""))
    run.log(step_event(5))
    events = read_log(run)
    told = [(event["step"], event["loss"]) for event in events if event["event"] == "step"]
    assert told == [(step, 1.0) for step in range(1, 6)]
    kinds = [event["event"] for event in events]
    assert kinds == ["step", "step", "saved", "resumed", "step", "evaluated", "step", "resumed", "step"]
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)


@pytest.mark.parametrize("torn", [b'{"event": "st', b"{", b"\0\0\0\0", b'{"event": "step", "step": 2}\xff'])
def test_a_torn_last_line_is_passed_over_and_harms_no_later_one(run: RunFolder, torn: bytes) -> None:
    run.log(step_event(1))
    with open(run.log_path, "ab") as file:
        file.write(torn)
    assert [event["step"] for event in read_log(run)] == [1]
    with run.lock():
        run.log(step_event(2))
    assert [event["step"] for event in read_log(run)] == [1, 2]


def test_every_beginning_of_a_log_can_be_read(run: RunFolder) -> None:
    run.log(Notice("naïve “quotes”"))
    run.log(step_event(1))
    whole = run.log_path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        run.log_path.write_bytes(whole[:length])
        # A line that lacks nothing but its end is a whole event.
        assert len(read_log(run)) == sum(end - 1 <= length for end in ends)


def test_a_run_without_a_log_has_no_events(run: RunFolder) -> None:
    assert read_log(run) == []
