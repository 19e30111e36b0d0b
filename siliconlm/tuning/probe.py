"""Real training steps in child processes with growing micro-batch, until memory, speed or time says stop.

The parent always survives: a child that fails, hangs, swaps or is killed is an answer ("does not fit"), not an error.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import siliconlm
from siliconlm.config import RunConfig, divisors
from siliconlm.events import Probed
from siliconlm.hardware.device import Device

MEASURE_SECONDS = 1.0
FRACTION = 0.9  # of what the GPU recommends: allocations beyond it fail in the child instead of swapping
ENOUGH = 0.98  # the smallest setting within 2 % of the best speed is chosen
SLOWER = 0.9  # a setting under this share of the best speed ends the search
POLL_SECONDS = 0.05
CHILD = (sys.executable, "-P", "-m", "siliconlm.tuning.child")  # -P: no module out of the user's current folder
SWAP_GROWTH = 64 << 20
DRIVER_OUT_OF_MEMORY = "Insufficient Memory"  # Metal says this on stderr and goes on with unfinished buffers
CANARY = 0.01  # nats by which the same loss may differ when computed twice


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one child: its last JSON line, or why there is none."""

    values: dict[str, float]
    failure: str = ""
    out_of_memory: bool = False
    stopped: bool = False
    cold: bool = False  # there was time for the first step only


def probe_batches(config: RunConfig, device: Device, seconds: float) -> Iterator[Probed]:
    """Try growing micro-batches of a resolved config (its `machine.micro_batch` is ignored) for at most `seconds`.

    Candidates divide the sequences of a step, so that tokens per step never change. Ends at the first that does not
    fit, the second in a row that is slower than the best by a tenth (one alone may be the machine's noise), or the
    first that would not fit by the line through the last two.
    """
    deadline = time.monotonic() + seconds
    budget = device.memory_budget()
    most, fault = device.largest_micro_batch(config.model)
    tried: list[Probed] = []
    for micro in _candidates(config):
        left = deadline - time.monotonic()
        reason = fault if micro > most else _hopeless(tried, micro, budget)
        if reason:
            yield _row(config, device, micro, 0, 0.0, "too big", reason)
            return
        if tried and left < 1.5 * _child_seconds(tried, micro):
            yield _row(config, device, micro, 0, 0.0, "stopped", "no time left for a bigger one")
            return
        row = probe(config.replace("probe", **{"machine.micro_batch": micro}), device, budget, max(left, 10.0))
        if row.verdict == "fits" and row.tokens_per_s < SLOWER * max((item.tokens_per_s for item in tried), default=0):
            row = replace(row, verdict="slower", reason="over a tenth slower than the best")
        yield row
        tried.append(row)
        if row.verdict not in ("fits", "slower") or [item.verdict for item in tried[-2:]] == ["slower", "slower"]:
            return


def probe(config: RunConfig, device: Device, budget: int, seconds: float) -> Probed:
    """Train with one setting in a fresh child process. `budget` is bytes the child may hold, `seconds` its time."""
    micro = config.machine.micro_batch or 0
    answer = run_child(config, device, budget, seconds)
    values = answer.values
    if answer.failure:
        verdict = "too big" if answer.out_of_memory else "stopped" if answer.stopped else "failed"
        return _row(config, device, micro, 0, 0.0, verdict, answer.failure)
    rate = config.train.tokens_per_step / values["step_seconds"]
    memory = int(values["memory"])
    if not values["canary"] <= CANARY:  # so written, a NaN fails as well
        return _row(config, device, micro, memory, rate, "failed", "the same loss came out differently when repeated")
    if memory > budget:
        return _row(config, device, micro, memory, rate, "too big", f"over the memory budget of {budget / 1e9:.1f} GB")
    return _row(config, device, micro, memory, rate, "fits", "timed on the first step" if answer.cold else "")


def run_child(config: RunConfig, device: Device, budget: int, seconds: float) -> Answer:
    """Start the child, watch it (time, resident memory, swap) and read its answer."""
    request = {"config": _for_child(config, device), "fraction": FRACTION, "seconds": MEASURE_SECONDS}
    swap = psutil.swap_memory().used
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=out, stderr=err, env=child_environment()) as child:
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has died already: its code and its last words say why
                child.stdin.write(json.dumps(request).encode())
                child.stdin.close()
            try:
                stopped = _watch(child, budget if device.resident else sys.maxsize, seconds, swap)
            finally:
                child.kill()
        return _answer(child.returncode, stopped, _content(out), _content(err))


def child_environment() -> dict[str, str]:
    """The environment of a child begun with `python -P -m`, in which it finds the package that runs here.

    A bare source tree is found by the current folder, which -P leaves out, so its folder is named. An installed
    package is found anyway, and its folder must not come before the standard library.
    """
    root = Path(siliconlm.__file__).absolute().parents[1]
    if root in map(Path, [*site.getsitepackages(), site.getusersitepackages()]):
        return dict(os.environ)
    others = os.environ.get("PYTHONPATH")  # an empty part would stand for the current folder
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *([others] if others else [])])}


def _watch(child: subprocess.Popen[bytes], budget: int, seconds: float, swap: int) -> Answer | None:
    """Wait for the child's end; an Answer when it had to be stopped before."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            child.wait(POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > deadline:
            return Answer({}, f"no answer within {seconds:.0f} s", stopped=True)
        if _resident(child.pid) > budget:
            return Answer({}, f"went over the memory budget of {budget / 1e9:.1f} GB", out_of_memory=True)
        if psutil.swap_memory().used - swap > SWAP_GROWTH:
            return Answer({}, "the machine began to swap", out_of_memory=True)


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0  # it has just ended


def _answer(code: int, stopped: Answer | None, out: str, err: str) -> Answer:
    values = _last_object(out)
    if stopped and stopped.stopped and "step_seconds" in values:
        return Answer(values, cold=True)
    if stopped:
        return stopped
    if DRIVER_OUT_OF_MEMORY in err:
        return Answer({}, "the GPU's driver ran out of memory", out_of_memory=True)
    if code < 0:
        return Answer({}, f"the process was killed by signal {-code}", out_of_memory=code == -9)
    if code or not values:  # an answer of the first step does not make up for a crash in the second
        last = err.strip().splitlines()[-1:] or ["no output"]
        return Answer({}, f"the process ended with code {code}: {last[0]}")
    if "error" in values:
        return Answer({}, str(values["error"]), out_of_memory=bool(values["out_of_memory"]))
    return Answer(values)


def _last_object(out: str) -> dict[str, Any]:
    """The last line of a child's output; empty when it is no JSON object."""
    try:
        values = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return values if isinstance(values, dict) else {}


def best_of(rows: list[Probed]) -> Probed | None:
    """The smallest micro-batch within 2 % of the best speed among those that fit."""
    fitting = [row for row in rows if row.verdict == "fits"]
    if not fitting:
        return None
    best = max(row.tokens_per_s for row in fitting)
    return next(row for row in fitting if row.tokens_per_s >= ENOUGH * best)


def _candidates(config: RunConfig) -> list[int]:
    """Divisors of the sequences of a step, each about double the one before."""
    chosen: list[int] = []
    for size in divisors(config.sequences_per_step):
        if not chosen or size >= 2 * chosen[-1] or size == config.sequences_per_step:
            chosen.append(size)
    return chosen


def _hopeless(tried: list[Probed], micro: int, budget: int) -> str:
    """Why a micro-batch need not be tried: the line through the last two measurements ends above the budget."""
    if len(tried) < 2:
        return ""
    before, last = tried[-2:]
    per_sequence = (last.memory - before.memory) / (last.micro_batch - before.micro_batch)
    predicted = last.memory + per_sequence * (micro - last.micro_batch)
    if predicted <= budget:
        return ""
    return f"would need {predicted / 1e9:.1f} GB by the line through the last two; the budget is {budget / 1e9:.1f} GB"


def _child_seconds(tried: list[Probed], micro: int) -> float:
    """An estimate of how long the child for `micro` will run: start-up, a warm-up and the measurement."""
    last = tried[-1]
    per_sequence = last.context / last.tokens_per_s
    return 5.0 + MEASURE_SECONDS + 3 * micro * per_sequence


def _for_child(config: RunConfig, device: Device) -> dict[str, object]:
    machine = {"device": device.kind, "dtype": device.dtype_name, "threads": device.threads}
    tables = config.model_dump(exclude_none=True)
    tables["machine"] |= machine
    return tables


def _row(config: RunConfig, device: Device, micro: int, memory: int, rate: float, verdict: str, reason: str) -> Probed:
    return Probed(micro, config.model.context, device.dtype_name, memory, round(rate, 1), verdict, reason)  # type: ignore[arg-type]


def _content(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return file.read().decode(errors="replace")  # type: ignore[attr-defined]
