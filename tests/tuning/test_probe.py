"""One setting in a child process: the parent outlives whatever the child does, and says what it was."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import siliconlm
from siliconlm.config import Layer, RunConfig, parse_assignments, resolve
from siliconlm.hardware.device import Device, open_device
from siliconlm.tuning import probe as module
from siliconlm.tuning import selftest_child
from siliconlm.tuning.probe import probe, rate, run_child, variant

MIB = 1 << 20
PLENTY = 64 << 30


def answer(**values: object) -> str:
    """The words of a child that answers at once; a micro-batch takes half a second and an update none."""
    usual: dict[str, object] = {"memory": 5, "forward_seconds": 0.5, "update_seconds": 0.0, "canary": 0.0}
    usual["loss"] = math.log(64)
    words = json.dumps(usual | {"burst_seconds": 0.25} | values)
    return f"import sys; sys.stdin.readline(); print({words!r}, flush=True)"


def config_of(*assignments: str) -> RunConfig:
    shape = ["model.vocab_size=64", "model.context=32", "train.tokens_per_step=256", "machine.micro_batch=4"]
    return resolve(parse_assignments([*shape, *assignments]))


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device(resolve(Layer("test", {"machine.device": "cpu", "machine.threads": 1})).machine)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Use other code as the probe's child; call it again to read the numbers it left."""
    marks = tmp_path / "marks"
    monkeypatch.setenv("MARKS", str(marks))

    def use(code: str | None = None) -> list[int]:
        if code is not None:
            monkeypatch.setattr(module, "CHILD", (sys.executable, "-c", code))
        left = [int(line) for line in marks.read_text().split()] if marks.exists() else []
        marks.unlink(missing_ok=True)
        return left

    return use


# --- where the child is begun ----------------------------------------------------------------------------------------


def test_the_current_folder_holds_no_modules_for_the_child(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's folder may hold any numpy.py, and `python -m` alone would look there first."""
    for name in ("numpy", "psutil", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    answer = run_child(config_of("train.tokens_per_step=128"), device, PLENTY, 60.0)
    assert answer.values["memory"] > 0, answer.failure
    assert next(selftest_child.self_test(device)).passed


def test_a_bare_source_tree_is_found_by_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "siliconlm" / "__init__.py"
    package.parent.mkdir()
    package.write_text("print('found')")
    monkeypatch.setattr(siliconlm, "__file__", str(package))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    told = module.child_environment()
    assert told["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "/elsewhere"]
    command = [sys.executable, "-P", "-c", "import siliconlm"]
    assert subprocess.run(command, env=told, capture_output=True, text=True).stdout == "found\n"
    monkeypatch.delenv("PYTHONPATH")
    assert module.child_environment()["PYTHONPATH"] == str(tmp_path)
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [str(tmp_path)])
    assert "PYTHONPATH" not in module.child_environment()  # installed: found without


# --- whatever the child does -----------------------------------------------------------------------------------------

FATES = {
    "killed for its memory": ("import os; os.kill(os.getpid(), 9)", "too big", "killed by signal 9"),
    "crashed in native code": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "by signal 11"),
    "ended without a word": ("raise SystemExit(3)", "failed", "ended with code 3: no output"),
    "said why and ended": ("raise SystemExit('no such thing')", "failed", "ended with code 1: no such thing"),
    "printed no JSON": ("import sys; sys.stdin.readline(); print('loss 3.2')", "failed", "ended with code 0"),
    "printed another JSON": ("import sys; sys.stdin.readline(); print('[1, 2]')", "failed", "ended with code 0"),
    "printed bytes that are no text": ("import sys; sys.stdout.buffer.write(bytes([255, 254]))", "failed", "code 0"),
    "printed a loss that is wrong each time": (
        answer(loss=0.0),
        "failed",
        "the loss is wrong: 0.00, where fresh weights have about",
    ),
    "printed a loss that changes": (answer(canary=1.0), "failed", "differently"),
    "the driver ran out": (
        "import sys; sys.stderr.write('MTLCommandBuffer: Insufficient Memory (00000008)\\n');" + answer(),
        "too big",
        "driver ran out of memory",
    ),
    "an error told in order": (
        'print(\'{"error": "MPS backend out of memory", "out_of_memory": true}\')',
        "too big",
        "MPS backend out of memory",
    ),
    "another error told in order": ('print(\'{"error": "shapes", "out_of_memory": false}\')', "failed", "shapes"),
    "answered with too much memory": (
        answer(memory=PLENTY + 1),
        "too big",
        "over the memory budget of 68.7 GB",
    ),
    "a loss that is not a number": (answer(loss=float("nan")), "failed", "the loss is wrong: nan"),
    "a second loss that is not a number": (answer(canary=float("nan")), "failed", "differently"),
    "crashed after its first step": (
        answer() + "; raise SystemExit('no more')",
        "failed",
        "ended with code 1: no more",
    ),
    "all is well": (answer(canary=0.001), "fits", ""),
}


@pytest.mark.parametrize("fate", FATES)
def test_the_parent_outlives_its_child(children: Any, device: Device, fate: str) -> None:
    code, verdict, reason = FATES[fate]
    children(code)
    row = probe(config_of(), device, PLENTY, seconds=30)
    assert row.verdict == verdict and reason in row.reason
    assert (row.micro_batch, row.context, row.dtype) == (4, 32, "float32")
    if verdict == "fits":
        assert row.memory == 5 and row.tokens_per_s == 256 / (2 * 0.5), "two micro-batches a step"
        assert row.burst == 256 / (2 * 0.25) and (row.forward_seconds, row.update_seconds) == (0.5, 0.0)


def test_a_child_that_is_gone_before_it_is_asked(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Its stdin may be closed before the question is written; that must not be the parent's end."""
    monkeypatch.setattr(module, "CHILD", ("/bin/sh", "-c", "exec <&-; exit 4"))
    rows = [probe(config_of(), device, PLENTY, seconds=30) for _ in range(5)]
    assert {(row.verdict, row.reason) for row in rows} == {("failed", "the process ended with code 4: no output")}


@pytest.mark.parametrize(
    ("behaviour", "budget", "limit", "verdict", "reason"),
    [
        ("signal.pause()", PLENTY, 1, "stopped", "no answer within 1 s"),
        ("held = b'x' * (400 << 20); signal.pause()", 200 * MIB, 30, "too big", "went over the memory budget"),
    ],
)
def test_a_child_that_never_ends_is_ended(
    children: Any, device: Device, tmp_path: Path, behaviour: str, budget: int, limit: float, verdict: str, reason: str
) -> None:
    children(f"import os, signal; open(os.environ['MARKS'], 'w').write(str(os.getpid())); {behaviour}")
    row = probe(config_of(), device, budget, seconds=limit)
    assert row.verdict == verdict and reason in row.reason
    [pid] = children()
    assert not psutil.pid_exists(pid)


def test_a_child_with_time_for_one_step_only_is_believed_and_said_so(children: Any, device: Device) -> None:
    children(answer() + "; import signal; signal.pause()")
    row = probe(config_of(), device, PLENTY, seconds=1)
    assert (row.verdict, row.reason, row.tokens_per_s) == ("fits", "timed on the first step", 256)


def test_a_child_that_had_time_for_more_than_its_first_step_has_hung(children: Any, device: Device) -> None:
    """Its step took nothing; after it, thrice what the rest would have taken went by."""
    quick = answer(forward_seconds=0.0)
    children(quick + "; import signal; signal.pause()")
    row = probe(config_of(), device, PLENTY, seconds=module.CHILD_SECONDS + module.PATIENCE * 0.1 + 0.1, measure=0.1)
    assert row.verdict == "stopped" and row.reason.startswith("it hung after the first step")


def test_a_child_that_fails_by_a_bug_ends_with_its_traceback() -> None:
    """And is not aborted as its interpreter ends beside the thread that waits for the parent's end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(module.CHILD, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdin and child.stderr
        child.stdin.write('{"config": {"model": {"n_layer": 0}}}\n')
        child.stdin.flush()
        assert child.wait(60) == 1
        assert "model.n_layer" in child.stderr.read().splitlines()[-1]


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """Whatever it is at: the real child, stopped while it computes, and a parent that is killed."""
    code = (
        "import sys; from siliconlm.tuning import probe; from siliconlm.hardware.device import open_device\n"
        "from siliconlm.config import Layer, resolve\n"
        "shape = {'model.vocab_size': 64, 'model.context': 32, 'train.tokens_per_step': 256}\n"
        "config = resolve(Layer('test', shape | {'machine.micro_batch': 4, 'machine.device': 'cpu'}))\n"
        "probe.run_child(config, open_device(config.machine), 1 << 40, 600.0, measure=600.0)\n"
    )
    parent = psutil.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (found := parent.children()):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs(found, timeout=60)
    assert gone == found


def test_the_drivers_words_count_where_the_child_hangs_after_them(children: Any, device: Device) -> None:
    children("import sys; sys.stderr.write('Insufficient Memory'); " + answer() + "; import signal; signal.pause()")
    row = probe(config_of(), device, PLENTY, seconds=1)
    assert (row.verdict, row.reason) == ("too big", "the GPU's driver ran out of memory")


def test_a_machine_that_begins_to_swap_ends_the_probe(
    children: Any, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([0, *[module.SWAP_GROWTH + 1] * 1000])
    real = psutil.swap_memory()
    monkeypatch.setattr(module.psutil, "swap_memory", lambda: real._replace(used=next(readings)))
    children("import signal; signal.pause()")
    row = probe(config_of(), device, PLENTY, seconds=30)
    assert (row.verdict, row.reason) == ("too big", "the machine began to swap")


# --- what is asked and what is told ----------------------------------------------------------------------------------


def test_the_question_keeps_the_recipe_and_names_the_machine(children: Any, device: Device) -> None:
    """The child resolves exactly the settings of the parent, with the device's own dtype and threads."""
    children("import sys; sys.stderr.write(sys.stdin.readline()); raise SystemExit(1)")
    question = json.loads(probe(config_of("train.seed=5"), device, PLENTY, 30).reason.split(": ", 1)[1])
    asked = question["config"]
    assert asked["model"] == config_of().model.model_dump()
    assert asked["train"]["seed"] == 5 and asked["train"]["tokens_per_step"] == 256
    assert asked["machine"] | {"device": "cpu", "dtype": "float32", "threads": 1, "micro_batch": 4} == asked["machine"]
    assert question["budget"] == PLENTY


def test_speed_counts_all_micro_batches_and_one_update() -> None:
    assert rate(config_of(), 4, forward=0.5, updating=1.0) == 256 / (2 * 0.5 + 1.0)


def test_what_differs_from_the_plain_step_is_named() -> None:
    assert variant(config_of()) == ""
    changed = config_of("machine.checkpointing=true", "machine.compile=true", "machine.chunked_loss=true")
    assert variant(changed) == "checkpointing, chunked loss, compiled"


@pytest.mark.parametrize("extra", [[], ["machine.checkpointing=true", "machine.chunked_loss=true"]])
def test_real_steps_are_measured(device: Device, extra: list[str]) -> None:
    row = probe(config_of(*extra), device, PLENTY, 60, predicted=7, measure=0.2)
    assert row.verdict == "fits" and row.reason == "" and row.predicted == 7
    assert 100 * MIB < row.memory < psutil.virtual_memory().total
    assert row.tokens_per_s == pytest.approx(rate(config_of(), 4, row.forward_seconds, row.update_seconds), rel=0.01)
    assert row.forward_seconds > 0 and row.update_seconds > 0 and row.burst > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to its address space")
def test_one_huge_allocation_fails_before_the_watch_could_see_it(device: Device) -> None:
    """Logits of 200 GB: refused by the child's own limit, and told as memory that ran out."""
    config = config_of("model.vocab_size=100000000", "model.n_embd=8", "model.context=128", "train.tokens_per_step=512")
    row = probe(config, device, 4 << 30, 60)
    assert row.verdict == "too big"
