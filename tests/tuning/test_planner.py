"""A model for a time: the ladder, the loss model, and the choice against an exhaustive look at every rung."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siliconlm.config import Layer, RunConfig, read_profile, resolve
from siliconlm.errors import SiliconError
from siliconlm.events import Notice, Planned, Probed
from siliconlm.hardware.device import Device
from siliconlm.model.decoder import count_parameters
from siliconlm.tuning import planner, probe
from siliconlm.tuning.planner import FITTED, LADDER, LossModel, Rung, Task, plan, step_tokens

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = Device("cpu", torch.float32, 1)
TASK = Task(seconds=120.0, train_tokens=1_000_000, val_tokens=100_000, bytes_per_token=1.0)
# A machine of 20 GFLOP/s, with some time for every micro-batch; it notes the shapes it was asked for.
MACHINE = """
import json, math, os, sys
config = json.loads(sys.stdin.readline())["config"]
model, micro = config["model"], config["machine"]["micro_batch"]
open(os.environ["MARKS"], "a").write(f"{model['n_layer']}x{model['n_embd']}\\n")
weights = model["n_layer"] * model["n_embd"] * (4 * model["n_embd"] + 3 * model["n_ff"])
forward = 0.002 + 6 * weights * micro * model["context"] / 20e9
memory = 3 * 10**8 + 20 * weights + 10**5 * micro
print(json.dumps({"memory": memory, "forward_seconds": forward, "update_seconds": weights / 1e8, "canary": 0.0,
                  "loss": math.log(128 + math.exp(0.02 * model["n_embd"])), "burst_seconds": forward}))
"""


def configure(rung: Rung, per_step: int) -> RunConfig:
    return resolve(rung.layer(per_step), Layer("test", {"model.vocab_size": 128, "machine.device": "cpu"}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The machine above in place of the probe's child; call it for the shapes it was asked for since the last call."""
    marks = tmp_path / "marks"
    monkeypatch.setenv("MARKS", str(marks))
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(probe, "CHILD", (sys.executable, "-c", MACHINE))

    def asked() -> list[str]:
        found = marks.read_text().split() if marks.exists() else []
        marks.unlink(missing_ok=True)
        return found

    return asked


def run(work: Iterator[Any]) -> tuple[list[Any], Planned, Rung]:
    events = []
    while True:
        try:
            events.append(next(work))
        except StopIteration as end:
            return events, *end.value


# --- the ladder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "small", "medium", "large"])
def test_presets_stand_on_the_ladder(preset: str) -> None:
    shape = {name: value for name, value in read_profile(preset, kind="preset").values.items() if "model." in name}
    shape.pop("model.dropout", None)
    rungs = [rung.layer(2048).values for rung in LADDER]
    assert shape in [{name: value for name, value in rung.items() if "model." in name} for rung in rungs]


def test_rungs_grow_and_can_be_built() -> None:
    counts = [count_parameters(configure(rung, rung.context).model) for rung in LADDER]
    assert all(1.3 < after / before < 4 for before, after in pairwise(counts))


@given(st.floats(1, 1e13))
def test_a_step_is_a_power_of_two_that_holds_whole_sequences(tokens: float) -> None:
    for rung in LADDER:
        size = step_tokens(rung, tokens)
        assert size & (size - 1) == 0 and size % rung.context == 0
        assert step_tokens(rung, 4 * tokens) in (size, 2 * size)


# --- the loss model --------------------------------------------------------------------------------------------------


@given(st.floats(1, 1e12), st.floats(1, 1e10), st.floats(0.5, 100))
def test_repeated_tokens_are_worth_less_and_less(tokens: float, unique: float, patience: float) -> None:
    model = LossModel(1.0, 1.0, 0.3, 1.0, 0.3, patience)
    worth = model.worth(tokens, unique)
    assert worth <= tokens * (1 + 1e-9)
    assert worth == tokens or worth <= unique * (1 + patience)
    assert model.worth(2 * tokens, unique) >= worth


@given(st.floats(1e4, 1e9), st.floats(1e4, 1e10))
def test_more_of_anything_is_never_worse(size: float, tokens: float) -> None:
    loss = FITTED.loss(size, tokens, 1e6)
    assert FITTED.loss(2 * size, tokens, 1e6) <= loss and FITTED.loss(size, 2 * tokens, 1e6) <= loss
    assert FITTED.loss(size, tokens, 2e6) <= loss


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    found = importlib.util.spec_from_file_location("fit_plan", BENCHMARKS / "fit_plan.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_constants_are_those_of_the_runs_that_are_kept(fitting: ModuleType) -> None:
    rows = fitting.used(fitting.read_runs())
    again = fitting.fit(rows)
    for row in rows:
        fitted = FITTED.loss(row["size"], row["tokens"], fitting.UNIQUE)
        assert fitted == pytest.approx(again.loss(row["size"], row["tokens"], fitting.UNIQUE), abs=2e-3)
        assert fitted == pytest.approx(row["val_loss"], abs=0.06)


# --- the choice ------------------------------------------------------------------------------------------------------


def exhaustive(machine: Any, task: Task) -> dict[str, float]:
    """Every rung measured, and its predicted loss."""
    known = {}
    for rung in LADDER:
        config = configure(rung, step_tokens(rung, 0))
        config = config.replace("test", **{"machine.micro_batch": config.unmeasured_micro_batch()})
        row = probe.probe(config, CPU, 1 << 40, 60)
        known[rung.name] = planner.Speed(
            row.forward_seconds / (row.micro_batch * row.context), row.update_seconds, row.memory
        )
    machine()
    return {rung.name: planner._planned(rung, known, CPU, task, configure).val_loss for rung in LADDER}


@pytest.mark.parametrize("seconds", [10.0, 120.0, 3600.0, 86400.0])
def test_a_few_measurements_find_the_best_of_all(machine: Any, seconds: float) -> None:
    task = Task(seconds, 50_000_000, 100_000, 1.0)
    truth = exhaustive(machine, task)
    events, best, rung = run(plan(CPU, task, configure))
    asked = machine()
    assert best.rung == rung.name == min(truth, key=truth.__getitem__)
    assert best.measured and best.val_loss == pytest.approx(truth[best.rung], rel=1e-6)
    assert len(asked) == len(set(asked)) <= 6 and len(asked) >= 3
    rows = [event for event in events if isinstance(event, Planned)]
    assert [row.rung for row in rows if row.chosen] == [best.rung]
    assert {row.rung for row in rows if row.measured} == set(asked)
    assert [row.rung for row in rows] == [rung.name for rung in LADDER]


def test_longer_times_get_larger_models(machine: Any) -> None:
    sizes = [run(plan(CPU, Task(time, 10**9, 10**5, 1.0), configure))[1].parameters for time in (10, 1000, 1e5)]
    assert sizes == sorted(set(sizes))


def test_what_was_measured_is_not_measured_again(machine: Any) -> None:
    _, first, _ = run(plan(CPU, TASK, configure))
    asked = machine()
    _, again, _ = run(plan(CPU, TASK, configure))
    assert machine() == [] and again == first
    _, _, _ = run(plan(CPU, TASK, configure, refresh=True))
    assert machine() == asked
    [path] = (Path(planner.home()) / "speeds").iterdir()
    path.write_text("speeds = 3\n")
    run(plan(CPU, TASK, configure))
    assert machine() == asked, "a damaged file is measured anew"


def test_what_does_not_fit_is_left_out_with_all_that_is_larger(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = MACHINE.replace(
        "print(", "print(json.dumps({'error': 'full', 'out_of_memory': True}) if weights > 2e5 else "
    )
    monkeypatch.setattr(probe, "CHILD", (sys.executable, "-c", limited))
    events, best, _ = run(plan(CPU, Task(1e6, 10**9, 10**5, 1.0), configure))
    assert best.rung == "2x64"
    assert {event.verdict for event in events if isinstance(event, Probed)} == {"fits", "too big"}
    monkeypatch.setattr(probe, "CHILD", (sys.executable, "-c", limited.replace("2e5", "0")))
    with pytest.raises(SiliconError, match="not even the smallest"):
        run(plan(CPU, TASK, configure, refresh=True))


def test_rungs_that_contradict_what_is_set_by_hand_are_left_out(machine: Any) -> None:
    def by_hand(**values: Any) -> Any:
        given = {"model.vocab_size": 128, "machine.device": "cpu", **values}
        return lambda rung, per_step: resolve(rung.layer(per_step), Layer("--set", given))

    events, _, _ = run(plan(CPU, TASK, by_hand(**{"train.tokens_per_step": 512})))
    shown = [event for event in events if isinstance(event, Planned)]
    assert {row.rung for row in shown} == {rung.name for rung in LADDER if rung.context <= 512}
    assert {row.tokens_per_step for row in shown} == {512}
    with pytest.raises(SiliconError, match=r"not a multiple of model\.context 1000"):
        run(plan(CPU, TASK, by_hand(**{"model.context": 1000})))


def test_what_is_predicted_not_to_fit_is_not_measured(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "memory_budget", lambda self: 400 * 10**6)
    _, best, _ = run(plan(CPU, Task(1e6, 10**9, 10**5, 1.0), configure))
    assert best.memory <= 400 * 10**6 and best.measured
    assert not {"8x448", "12x512", "14x640", "16x768"} & set(machine()), "far over it"


def test_a_failure_that_is_no_lack_of_memory_is_not_called_one(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHILD", (sys.executable, "-c", "raise SystemExit('no such kernel')"))
    with pytest.raises(SiliconError, match="no such kernel") as caught:
        run(plan(CPU, TASK, configure))
    assert caught.value.kind == "training_failed" and "self-test" in caught.value.fix


def test_measuring_is_said_once_before_it_begins(machine: Any) -> None:
    events, _, _ = run(plan(CPU, TASK, configure))
    assert [isinstance(event, Notice) for event in events[:2]] == [True, False]
    assert len([event for event in events if isinstance(event, Notice)]) == 1
    assert not [event for event in run(plan(CPU, TASK, configure))[0] if isinstance(event, Notice)]


def test_losses_of_other_tokenizers_are_per_token(machine: Any) -> None:
    """Two bytes a token: a token's loss is that of two bytes, after twice the bytes."""
    known = {rung.name: planner.Speed(1e-5, 0.01, 10**8) for rung in LADDER[:3]}
    bpe = Task(120.0, 500_000, 50_000, 2.0)
    row = planner._planned(LADDER[1], known, CPU, bpe, configure)
    size = row.parameters - 128 * 64
    assert row.val_loss == pytest.approx(2 * FITTED.loss(size, 2 * row.tokens, 1_000_000), rel=1e-4)
    assert json.dumps(row.as_json())


def test_no_loss_is_predicted_above_an_untrained_models(machine: Any) -> None:
    known = {rung.name: planner.Speed(1e-5, 0.01, 10**8) for rung in LADDER[:3]}
    row = planner._planned(LADDER[1], known, CPU, Task(120.0, 250_000, 25_000, 8.0), configure)
    assert row.val_loss == pytest.approx(math.log(128), rel=1e-4)


# --- what is set by hand ---------------------------------------------------------------------------------------------


def by_hand(**settings: Any) -> planner.Configure:
    values = {name.replace("__", "."): value for name, value in settings.items()}
    last = Layer("test", {"model.vocab_size": 128, "machine.device": "cpu"})
    return lambda rung, per_step: resolve(rung.layer(per_step), last, Layer("--set", values))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_rungs_that_become_one_model_are_one_rung(machine: Any, layers: int) -> None:
    given = by_hand(model__n_layer=layers)
    names = [rung.name for rung in planner.ladder(given)]
    assert "2x64" in names and "4x64" not in names and "4x96" in names
    rows = [event for event in run(plan(CPU, TASK, given))[0] if isinstance(event, Planned)]
    assert [row.rung for row in rows] == names and sum(row.chosen for row in rows) == 1


def test_a_plan_leaves_out_what_contradicts_and_keeps_the_rest(machine: Any) -> None:
    given = by_hand(model__n_kv_head=2)
    names = [rung.name for rung in planner.ladder(given)]
    assert "2x32" not in names and "4x128" in names
    for refresh in (False, True):
        assert run(plan(CPU, TASK, given, refresh))[1].rung in names


@pytest.mark.parametrize("settings", [{"model__n_layer": 2}, {"model__context": 128}, {"machine__micro_tokens": 8192}])
def test_speeds_of_other_settings_are_not_taken(machine: Any, settings: dict[str, Any]) -> None:
    """Also where by hand stands what the smallest rung has anyway."""
    run(plan(CPU, TASK, configure))
    assert machine()
    run(plan(CPU, TASK, by_hand(**settings)))
    assert machine(), "measured anew"
    run(plan(CPU, TASK, configure))
    run(plan(CPU, TASK, by_hand(**settings)))
    assert not machine(), "and both are kept"
