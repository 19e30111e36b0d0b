"""The search for a micro-batch on machines made of four numbers: seconds a + b x size, bytes c + d x size."""

from __future__ import annotations

import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from siliconlm.config import Layer, RunConfig, divisors, resolve
from siliconlm.events import Probed
from siliconlm.hardware.device import Device
from siliconlm.tuning import probe as probing
from siliconlm.tuning.probe import COLD, rate
from siliconlm.tuning.search import Next, Search, between, fastest, largest, sizes

CPU = Device("cpu", torch.float32, 1)
BUDGET = 1 << 30


def config_of(sequences: int = 64) -> RunConfig:
    shape = {"model.vocab_size": 64, "model.context": 32, "train.tokens_per_step": 32 * sequences}
    return resolve(Layer("test", shape))


def made(sequences: int, forecast: dict[int, int], seconds: float = 3600.0) -> Search:
    search = Search(config_of(sequences), CPU, time.monotonic() + seconds, forecast)
    search.budget = BUDGET
    return search


class Machine:
    """Answers as a probe would, at once; notes what was tried."""

    def __init__(self, a: float, b: float, c: float, d: float, updating: float = 0.01) -> None:
        self.a, self.b, self.c, self.d, self.updating = a, b, c, d, updating
        self.tried: list[int] = []

    def memory(self, size: int) -> int:
        return int(self.c + self.d * size)

    def row(self, config: RunConfig, size: int) -> Probed:
        self.tried.append(size)
        if self.memory(size) > BUDGET:
            return Probed(size, 32, "float32", 0, 0.0, "too big", "full")
        forward = self.a + self.b * size
        speed = rate(config, size, forward, self.updating)
        figures = {"forward_seconds": forward, "update_seconds": self.updating}
        return Probed(size, 32, "float32", self.memory(size), speed, "fits", **figures)  # type: ignore[arg-type]

    def run(self, search: Search, next_size: Next) -> None:
        """What Search.run does, without processes: the same questions, answered by this machine."""
        while (size := next_size(search)) is not None:
            if search.predicted(size) > search.budget:
                search.ceiling = size
                continue
            row = self.row(search.config, size)
            search.rows.append(row)
            if row.verdict != "fits":
                search.ceiling = size

    def forecast(self, sequences: int, error: float = 1.0) -> dict[int, int]:
        every = sizes(config_of(sequences))
        return {size: int(error * self.memory(size)) for size in (every[0], every[len(every) // 2], every[-1])}


machines = st.builds(
    Machine,
    a=st.floats(1e-4, 0.5),
    b=st.floats(1e-4, 0.05),
    c=st.floats(1e8, 6e8),
    d=st.floats(1e5, 3e8),
)
steps = st.integers(1, 512)


@given(machines, steps, st.floats(0.87, 1.15))
def test_a_few_tries_find_the_fastest_that_fits(machine: Machine, sequences: int, error: float) -> None:
    search = made(sequences, machine.forecast(sequences, error))
    assume(search.predicted(1) <= BUDGET)
    machine.run(search, fastest)
    best = search.best()
    fitting = [size for size in sizes(search.config) if machine.memory(size) <= BUDGET]
    assert len(set(machine.tried)) <= 6 and max(Counter(machine.tried).values()) <= 2
    if not fitting:
        assert best is None
        return
    assert best is not None
    # A size that only the forecast's error keeps out is not missed by much: the next smaller one was tried.
    reachable = [size for size in fitting if error * machine.memory(size) <= BUDGET] or fitting[:1]
    speeds = {size: rate(search.config, size, machine.a + machine.b * size, machine.updating) for size in reachable}
    assert best.tokens_per_s >= 0.97 * max(speeds.values())


@given(machines, steps, st.floats(0.87, 1.15))
def test_the_largest_is_at_least_half_of_what_fits(machine: Machine, sequences: int, error: float) -> None:
    search = made(sequences, machine.forecast(sequences, error))
    assume(search.predicted(1) <= BUDGET)
    machine.run(search, largest)
    fitting = [size for size in divisors(sequences) if machine.memory(size) <= BUDGET]
    if not fitting:
        assert not search.fitting
        return
    assert search.fitting[-1].micro_batch * (2 if error <= 1.0 else 4) >= fitting[-1]
    assert len(machine.tried) <= 6


@given(machines, steps)
def test_nothing_is_tried_that_is_predicted_not_to_fit(machine: Machine, sequences: int) -> None:
    for goal in (fastest, largest):
        search = made(sequences, machine.forecast(sequences))
        machine.tried.clear()
        machine.run(search, goal)
        assert all(machine.memory(size) <= BUDGET for size in machine.tried), "the forecast is right on this machine"


@pytest.mark.parametrize("sequences", [1, 2, 7, 8, 12, 30, 64, 97])
def test_sizes_divide_the_step_and_about_double(sequences: int) -> None:
    chosen = sizes(config_of(sequences))
    assert chosen[0] == 1 and chosen[-1] == sequences and set(chosen) <= set(divisors(sequences))
    assert all(after >= 2 * before for before, after in pairwise(chosen[:-1])), "the last is all that is left"
    assert chosen == sorted(set(chosen))


def test_a_line_goes_through_its_neighbours() -> None:
    points = {1: 10.0, 4: 40.0, 8: 120.0}
    assert [between(points, at) for at in (1, 2, 4, 6, 8, 16)] == [10, 20, 40, 80, 120, 280]
    assert between({4: 20.0}, 8) == 40


def test_the_forecast_is_corrected_by_what_was_measured() -> None:
    search = made(64, {1: 100, 64: 730})
    assert search.predicted(8) == 170
    search.rows.append(Probed(4, 32, "float32", 260, 1.0, "fits"))
    assert search.predicted(8) == 340, "twice the forecast at 4, so twice at 8"
    assert made(64, {}).predicted(8) == 0


def test_a_child_stopped_after_its_first_step_says_nothing_of_the_forecast() -> None:
    """It had not evaluated, which takes several sequences at once, and so most where the micro-batch is one."""
    search = made(64, {1: 100, 64: 730})
    search.rows.append(Probed(1, 32, "float32", 10, 1.0, "fits", COLD))
    assert search.predicted(64) == 730


def test_the_smallest_within_two_percent_of_the_best_is_chosen() -> None:
    def best(*rates: float) -> int:
        search = made(64, {})
        search.rows = [Probed(2**power, 32, "float32", 1, speed, "fits") for power, speed in enumerate(rates)]
        found = search.best()
        assert found
        return found.micro_batch

    assert best(50, 98.9, 100, 101) == 4 and best(50, 99, 100, 101) == 2
    assert made(64, {}).best() is None


# --- with processes --------------------------------------------------------------------------------------------------

CHILD = """
import json, math, os, sys
config = json.loads(sys.stdin.readline())["config"]
micro = config["machine"]["micro_batch"]
open(os.environ["MARKS"], "a").write(f"{micro}\\n")
tries = open(os.environ["MARKS"]).read().split().count(str(micro))
answer = {"memory": 10**8 + 10**6 * micro, "update_seconds": 0.0, "canary": 0.0, "burst_seconds": 0.1}
answer["loss"] = math.log(config["model"]["vocab_size"])
"""
QUICK = CHILD + "print(json.dumps(answer | {'forward_seconds': 0.1 + 0.1 * micro}))"


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Use other code as the probe's child; call it without any for the sizes that were tried."""
    marks = tmp_path / "marks"
    monkeypatch.setenv("MARKS", str(marks))

    def use(code: str | None = None) -> list[int]:
        if code is not None:
            monkeypatch.setattr(probing, "CHILD", (sys.executable, "-c", code))
        return [int(line) for line in marks.read_text().split()] if marks.exists() else []

    return use


def test_a_failure_that_does_not_come_again_is_forgotten(child: Any) -> None:
    child(QUICK.replace("print(", "if tries == 1: os.kill(os.getpid(), 9)\nprint("))
    search = made(4, {1: 10**8, 4: 2 * 10**8})
    rows = list(search.run(largest))
    assert child() == [1, 1, 4, 4]
    assert [(row.micro_batch, row.verdict) for row in rows] == [
        (1, "too big"),
        (1, "fits"),
        (4, "too big"),
        (4, "fits"),
    ]


def test_a_child_that_hangs_leaves_time_to_go_on() -> None:
    search = made(1, {1: 10**8}, seconds=32.0)
    assert 15 < search.patience(1) < 17, "half of the time"
    search.rows.append(Probed(1, 32, "float32", 0, 0.0, "stopped", "no answer"))
    assert 31 < search.patience(1) <= 32, "and then all of it"
    search = made(64, {}, seconds=100.0)
    search.rows.append(Probed(1, 32, "float32", 10**8, 1.0, "fits", forward_seconds=0.1))
    assert search.patience(1) == 15 < search.patience(8) == 3 * search.child_seconds(8)
    assert 49 < search.patience(64) < 50, "half of the time"
    search.rows.append(Probed(2, 32, "float32", 10**8, 1.0, "fits", forward_seconds=0.5))
    assert search.patience(64) == search.child_seconds(64), "not less than it should take"


def test_a_failure_that_comes_again_is_believed(child: Any) -> None:
    child(QUICK.replace("print(", "if micro > 2: raise SystemExit('no')\nprint("))
    search = made(4, {1: 10**8, 4: 2 * 10**8})
    list(search.run(largest))
    assert child() == [1, 4, 4, 2] and search.fitting[-1].micro_batch == 2
    assert (search.ceiling, search.limit) == (4, "the process ended with code 1: no")


def test_a_measured_overrun_is_believed_at_once(child: Any) -> None:
    child(QUICK.replace("print(", f"if micro > 2: answer['memory'] = {BUDGET} + 1\nprint("))
    search = made(4, {})
    list(search.run(largest))
    assert child() == [1, 4, 2] and search.fitting[-1].micro_batch == 2


def test_a_cliff_ends_the_search(child: Any) -> None:
    child(CHILD + "print(json.dumps(answer | {'forward_seconds': micro * (0.1 if micro < 4 else 0.5)}))")
    search = made(64, {})
    rows = list(search.run(largest))
    cliff = [row for row in rows if row.verdict == "slower"]
    assert cliff and cliff[0].reason == "5.0 x slower per token than a micro-batch of 1"
    assert search.fitting[-1].micro_batch < 4


def test_what_needs_more_than_there_is_shows_the_prediction(child: Any) -> None:
    child(QUICK)
    search = made(4, {1: 10**8, 2: 10**8, 4: 2 * BUDGET})
    rows = list(search.run(fastest))
    assert child() == [1, 2] and rows[-1].micro_batch in (2, 4)
    assert all(row.predicted > 0 for row in rows)


def test_time_that_is_over_ends_the_search(child: Any) -> None:
    child(QUICK)
    search = made(64, {}, seconds=0.5)
    rows = list(search.run(fastest))
    assert child() == [1]
    assert [(row.verdict, row.reason) for row in rows[1:]] == [("stopped", "no time left to try it")]
    assert search.ceiling == rows[1].micro_batch


def test_known_faults_of_a_device_are_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences of 8,192 tokens are under the longest sum that this GPU gets right; sizes are 1, 2, 4..."""
    apple = Device("mps", torch.float32, 1, faults={"long_matmul": "off by 3"})
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 << 30)
    shape = {"model.vocab_size": 64, "model.context": 8192, "model.n_head": 1, "model.n_kv_head": 1}
    config = resolve(Layer("test", shape | {"train.tokens_per_step": 8192 * 16}))
    search = Search(config, apple, time.monotonic() + 60)
    assert search.allowed == [1, 2] and "pytorch#177116" in search.limit
