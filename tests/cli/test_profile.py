"""Measuring: the probe outlives whatever its child does, and what was measured once is found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import siliconlm
from siliconlm.config import Layer, RunConfig, divisors, parse_assignments, resolve
from siliconlm.events import Probed
from siliconlm.hardware.device import Device, open_device
from siliconlm.tuning import probe as module
from siliconlm.tuning import profiles, selftest_child
from siliconlm.tuning.probe import best_of, probe, probe_batches, run_child

if TYPE_CHECKING:
    from .conftest import Silicon, Trained

MIB = 1 << 20
PLENTY = 64 << 30
# A child that measures nothing: answers at once with more speed for more sequences, and leaves a mark.
QUICK = """
import json, os, sys
micro = json.load(sys.stdin)["config"]["machine"]["micro_batch"]
open(os.environ["MARKS"], "a").write(f"{micro}\\n")
print(json.dumps({"memory": 10**8 + 10**6 * micro, "step_seconds": 1 / micro, "canary": 0.0}))
"""


def config_of(*assignments: str) -> RunConfig:
    shape = ["model.vocab_size=64", "model.context=32", "train.tokens_per_step=256", "machine.micro_batch=4"]
    return resolve(parse_assignments([*shape, *assignments]))


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device(resolve(Layer("test", {"machine.device": "cpu", "machine.threads": 1})).machine)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Use other code as the probe's child; call it again to read which micro-batches were tried."""
    marks = tmp_path / "marks"
    monkeypatch.setenv("MARKS", str(marks))

    def use(code: str | None = None) -> list[int]:
        if code is not None:
            monkeypatch.setattr(module, "CHILD", (sys.executable, "-c", code))
        tried = [int(line) for line in marks.read_text().split()] if marks.exists() else []
        marks.unlink(missing_ok=True)
        return tried

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
    "printed no JSON": ("import sys; sys.stdin.read(); print('loss 3.2')", "failed", "ended with code 0"),
    "printed another JSON": ("import sys; sys.stdin.read(); print('[1, 2]')", "failed", "ended with code 0"),
    "printed bytes that are no text": ("import sys; sys.stdout.buffer.write(bytes([255, 254]))", "failed", "code 0"),
    "printed nothing but zeros": ('print(\'{"memory": 1, "step_seconds": 1, "canary": 1}\')', "failed", "differently"),
    "the driver ran out": (
        "import sys; sys.stderr.write('MTLCommandBuffer: Insufficient Memory (00000008)\\n');"
        'print(\'{"memory": 1, "step_seconds": 1, "canary": 0}\')',
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
        f'print(\'{{"memory": {PLENTY + 1}, "step_seconds": 1, "canary": 0}}\')',
        "too big",
        "over the memory budget of 68.7 GB",
    ),
    "a loss that is not a number": (
        'print(\'{"memory": 1, "step_seconds": 1, "canary": NaN}\')',
        "failed",
        "differently",
    ),
    "crashed after its first step": (
        'print(\'{"memory": 1, "step_seconds": 1, "canary": 0}\', flush=True); raise SystemExit(\'no more\')',
        "failed",
        "ended with code 1: no more",
    ),
    "all is well": ('print(\'{"memory": 5, "step_seconds": 0.5, "canary": 0.001}\')', "fits", ""),
}


@pytest.mark.parametrize("fate", FATES)
def test_the_parent_outlives_its_child(children: Any, device: Device, fate: str) -> None:
    code, verdict, reason = FATES[fate]
    children(code)
    row = probe(config_of(), device, PLENTY, seconds=30)
    assert row.verdict == verdict and reason in row.reason
    assert (row.micro_batch, row.context, row.dtype) == (4, 32, "float32")
    if verdict == "fits":
        assert row.memory == 5 and row.tokens_per_s == 256 / 0.5


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
    children('import signal; print(\'{"memory": 5, "step_seconds": 2, "canary": 0}\', flush=True); signal.pause()')
    row = probe(config_of(), device, PLENTY, seconds=1)
    assert (row.verdict, row.reason, row.tokens_per_s) == ("fits", "timed on the first step", 128)


def test_a_machine_that_begins_to_swap_ends_the_probe(
    children: Any, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([0, *[module.SWAP_GROWTH + 1] * 1000])
    real = psutil.swap_memory()
    monkeypatch.setattr(module.psutil, "swap_memory", lambda: real._replace(used=next(readings)))
    children("import signal; signal.pause()")
    row = probe(config_of(), device, PLENTY, seconds=30)
    assert (row.verdict, row.reason) == ("too big", "the machine began to swap")


# --- the search ------------------------------------------------------------------------------------------------------


def row(micro: int, rate: float = 100.0, verdict: Any = "fits", memory: int = 1000) -> Probed:
    return Probed(micro, 32, "float32", memory, rate, verdict)


def test_the_smallest_within_two_percent_of_the_best_is_chosen() -> None:
    assert best_of([row(1, 50), row(2, 98.9), row(4, 100), row(8, 101)]) == row(4, 100)
    assert best_of([row(1, 50), row(2, 99), row(4, 100), row(8, 101)]) == row(2, 99)
    assert best_of([row(1, 50), row(2, 500, "slower"), row(4, 900, "too big")]) == row(1, 50)
    assert best_of([row(1, 0, "failed")]) is None and best_of([]) is None


@pytest.mark.parametrize("sequences", [1, 2, 7, 8, 12, 30, 64, 97])
def test_candidates_divide_the_step_and_about_double(sequences: int) -> None:
    shape = Layer("x", {"model.context": 32, "train.tokens_per_step": 32 * sequences})
    chosen = module._candidates(resolve(shape))
    assert chosen[0] == 1 and chosen[-1] == sequences and set(chosen) <= set(divisors(sequences))
    assert all(after >= 2 * before for before, after in pairwise(chosen[:-1])), "the last is all that is left"
    assert chosen == sorted(set(chosen))


def test_what_would_not_fit_is_not_tried() -> None:
    tried = [row(1, memory=1000), row(2, memory=1500)]
    assert module._hopeless(tried, 4, budget=2500) == ""
    assert module._hopeless(tried, 4, budget=2499).startswith("would need 0.0 GB by the line")
    assert module._hopeless(tried[:1], 1 << 20, budget=1) == "", "one measurement makes no line"


def verdicts(rows: Iterator[Probed]) -> list[tuple[int, str]]:
    return [(item.micro_batch, item.verdict) for item in rows]


def test_the_search_ends_where_memory_speed_or_time_ends(children: Any, device: Device) -> None:
    answer = 'print(json.dumps({{"memory": {memory}, "step_seconds": {step}, "canary": 0}}))'
    start = "import json, sys\nmicro = json.load(sys.stdin)['config']['machine']['micro_batch']\n"
    config = config_of("train.tokens_per_step=512", "machine.micro_batch=1")

    children(start + answer.format(memory="10**8", step="1 / micro"))
    assert verdicts(probe_batches(config, device, 60)) == [
        (1, "fits"),
        (2, "fits"),
        (4, "fits"),
        (8, "fits"),
        (16, "fits"),
    ]

    children(start + answer.format(memory="10**8", step="1 if micro < 4 else 2"))
    assert verdicts(probe_batches(config, device, 60)) == [(1, "fits"), (2, "fits"), (4, "slower"), (8, "slower")]

    children(start + answer.format(memory="10**8", step="2 if micro == 2 else 1 / micro"))
    hump = verdicts(probe_batches(config, device, 60))
    assert hump[:3] == [(1, "fits"), (2, "slower"), (4, "fits")], "one slow measurement may be noise"

    budget = device.memory_budget()
    children(start + answer.format(memory=f"{budget} // 3 * micro", step="1 / micro"))
    assert verdicts(probe_batches(config, device, 60)) == [(1, "fits"), (2, "fits"), (4, "too big")]

    children(start + answer.format(memory="10**8", step="1 / micro"))
    assert verdicts(probe_batches(config, device, 2)) == [(1, "fits"), (2, "stopped")]


def test_the_question_keeps_the_recipe_and_names_the_machine(children: Any, device: Device) -> None:
    """The child resolves exactly the settings of the parent, with the device's own dtype and threads."""
    children("import sys; sys.stderr.write(sys.stdin.read()); raise SystemExit(1)")
    asked = json.loads(probe(config_of("train.seed=5"), device, PLENTY, 30).reason.split(": ", 1)[1])["config"]
    assert asked["model"] == config_of().model.model_dump()
    assert asked["train"]["seed"] == 5 and asked["train"]["tokens_per_step"] == 256
    assert asked["machine"] | {"device": "cpu", "dtype": "float32", "threads": 1, "micro_batch": 4} == asked["machine"]


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_or_two(made: Trained, tmp_path: Path) -> list[str]:
    """A model so small, and a step so short, that only micro-batches of 1 and 2 can be tried."""
    preset = tmp_path / "free.toml"
    preset.write_text(made.preset.read_text().replace("micro_batch = 2\n", ""))
    return ["--preset", str(preset)]


def test_probing_and_profiling_measure_real_steps(silicon: Silicon, one_or_two: list[str]) -> None:
    probed = silicon("probe-batch", *one_or_two, "--set", "train.tokens_per_step=32", "--limit", "30s")
    assert probed.code == 0
    header, line, choice = probed.out.splitlines()
    assert header.split() == ["micro-batch", "tokens", "dtype", "peak", "memory", "tokens/s", "verdict"]
    assert line.split()[:3] == ["1", "32", "float32"] and line.split()[-1] == "fits"
    assert choice.startswith("machine.micro_batch = 1 ")

    made = silicon("profile", *one_or_two, "--limit", "30s", "--json").json()
    fitting = {item["micro_batch"]: item for item in made["probes"] if item["dtype"] == "float32"}
    assert fitting.keys() == {1, 2} and all(item["verdict"] == "fits" for item in fitting.values())
    # a process with torch in it and a model holds more than 100 MB and less than this machine has
    assert all(100 * MIB < item["memory"] < psutil.virtual_memory().total for item in fitting.values())
    assert all(item["tokens_per_s"] > 0 for item in fitting.values())
    chosen = {item["setting"]: item for item in made["choices"]}
    assert chosen["machine.micro_batch"]["value"] in fitting
    assert chosen["model.context"]["value"] == 32 and chosen["machine.dtype"]["value"] in ("float32", "bfloat16")
    assert chosen["machine.device"]["value"] in ("cpu", "mps", "cuda")
    assert all(item["reason"] for item in made["choices"])


@pytest.fixture
def cached(silicon: Silicon, one_or_two: list[str], children: Any, home: Path) -> Path:
    """The file of a profile that quick children made."""
    children(QUICK)
    done = silicon("profile", *one_or_two)
    assert done.code == 0 and children()[:2] == [1, 2]
    [path] = (home / "profiles").iterdir()
    assert done.mentions(path)
    return path


def test_a_profile_is_found_again(silicon: Silicon, one_or_two: list[str], children: Any, cached: Path) -> None:
    first = cached.read_bytes()
    again = silicon("profile", *one_or_two)
    assert again.code == 0 and children() == [] and cached.read_bytes() == first
    assert "measured before" in again.told and "machine.micro_batch = 2 " in again.out

    refreshed = silicon("profile", *one_or_two, "--refresh")
    assert refreshed.code == 0 and children()[:2] == [1, 2] and "measured before" not in refreshed.told


def test_another_shape_or_optimiser_is_measured_anew(
    silicon: Silicon, one_or_two: list[str], children: Any, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ("optim.name=adamw", "model.n_layer=2", "train.tokens_per_step=32", "machine.checkpointing=true"):
        assert silicon("profile", *one_or_two, "--set", change).code == 0
        assert children()[0] == 1, f"{change} must be measured"
    facts = profiles.torch_facts()
    monkeypatch.setattr(profiles, "torch_facts", lambda: replace(facts, version="9.9.9"))
    assert silicon("profile", *one_or_two).code == 0 and children()[0] == 1
    assert len(list(cached.parent.iterdir())) == 6


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no TOML": lambda text: "\0\0" + text,
    "another machine's": lambda text: text.replace('system = "', 'system = "Other '),
    "an unknown setting": lambda text: text.replace("micro_batch = 2\ndtype", "micro_btch = 2\ndtype"),
    "a value that cannot be": lambda text: text.replace("micro_batch = 2\ndtype", "micro_batch = 7\ndtype"),
    "a table turned number": lambda text: "about = 3\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_profile_is_announced_and_measured_again(
    silicon: Silicon, one_or_two: list[str], children: Any, cached: Path, damage: str
) -> None:
    good = cached.read_text()
    bad = DAMAGES[damage](good)
    assert bad != good
    cached.write_text(bad)
    done = silicon("profile", *one_or_two)
    assert done.code == 0 and "damaged" in done.told and children()[:2] == [1, 2]
    assert silicon("profile", *one_or_two).code == 0 and children() == [], "the file is whole again"


def test_training_uses_the_profile_and_accepts_its_file(
    silicon: Silicon, own: Trained, one_or_two: list[str], children: Any, home: Path
) -> None:
    children(QUICK)
    command = ["train", "--data", "plays", *one_or_two, "--steps", "1"]
    first = silicon(*command, "--name", "first")
    assert first.code == 0 and children()[:2] == [1, 2] and "measuring this machine once" in first.told
    [path] = (home / "profiles").iterdir()

    second = silicon(*command, "--name", "second", "--json")
    assert second.code == 0 and children() == []
    [started] = [json.loads(line) for line in second.out.splitlines() if '"event": "started"' in line]
    assert started["micro_batch"] == 2 and started["choices"]

    dry = silicon(*command, "--dry-run", "--json").json()
    assert dry["settings"]["machine.micro_batch"] == {"value": 2, "source": "profile auto"}

    third = silicon(*command, "--name", "third", "--profile", str(path), "--dry-run", "--json").json()
    assert third["settings"]["machine.micro_batch"] == {"value": 2, "source": f"profile {path.stem}"}
    assert silicon(*command, "--name", "third", "--profile", str(path)).code == 0 and children() == []


def test_nothing_that_fits_is_an_error_with_a_remedy(
    silicon: Silicon, one_or_two: list[str], children: Any, home: Path
) -> None:
    children('print(\'{"error": "out of memory", "out_of_memory": true}\')')
    for command in ("probe-batch", "profile"):
        done = silicon(command, *one_or_two, "--json")
        assert done.code == 1 and done.json()["kind"] == "out_of_memory" and "--preset" in done.json()["fix"]
        if command == "profile":
            assert "--device" not in done.json()["fix"]  # it was measured on the CPU already
    assert not (home / "profiles").exists()
