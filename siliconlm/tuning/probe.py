"""One setting tried by real training steps in a child process with a memory cap of its own.

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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

import siliconlm
from siliconlm.config import RunConfig
from siliconlm.events import Probed
from siliconlm.hardware.device import Device
from siliconlm.model.decoder import fresh_loss

MEASURE_SECONDS = 1.0
FRACTION = 0.9  # of what the GPU recommends: allocations beyond it fail in the child instead of swapping
POLL_SECONDS = 0.05
CHILD = (sys.executable, "-P", "-m", "siliconlm.tuning.child")  # -P: no module out of the user's current folder
SWAP_GROWTH = 64 << 20
DRIVER_OUT_OF_MEMORY = "Insufficient Memory"  # Metal says this on stderr and goes on with unfinished buffers
CHILD_SECONDS = 4.0  # until a child has begun: the interpreter, torch, the model
PATIENCE = 3.0  # times the seconds that a child should take, and it counts as hanging
COLD = "timed on the first step"
CANARY = 0.01  # nats by which the same loss may differ when computed twice
NEAR_FRESH = 0.3  # by which the loss of fresh weights may differ from what is expected, as a share of it


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one child: its last JSON line, or why there is none."""

    values: dict[str, float]
    failure: str = ""
    out_of_memory: bool = False
    stopped: bool = False
    cold: bool = False  # there was time for the first step only

    @property
    def verdict(self) -> Literal["too big", "stopped", "failed"]:
        return "too big" if self.out_of_memory else "stopped" if self.stopped else "failed"


def probe(
    config: RunConfig, device: Device, budget: int, seconds: float, predicted: int = 0, measure: float = MEASURE_SECONDS
) -> Probed:
    """Train with one setting in a fresh child process.

    `config` has a micro-batch. `budget` is bytes the child may hold, `seconds` its time, `measure` the seconds it is
    timed for once it is warm.
    """
    answer = run_child(config, device, budget, seconds, measure)
    row = Probed(
        micro_batch=config.machine.micro_batch or 0,
        context=config.model.context,
        dtype=device.dtype_name,
        memory=int(answer.values.get("memory", 0)),
        tokens_per_s=0.0,
        verdict="failed",
        variant=variant(config),
        predicted=predicted,
    )
    if answer.failure:
        return replace(row, verdict=answer.verdict, reason=answer.failure)
    forward, updating = answer.values["forward_seconds"], answer.values["update_seconds"]
    row = replace(row, forward_seconds=forward, update_seconds=updating)
    row = replace(row, tokens_per_s=round(rate(config, row.micro_batch, forward, updating), 1))
    fresh = fresh_loss(config.model)
    if not abs(answer.values["loss"] - fresh) <= NEAR_FRESH * fresh:  # so written, a NaN fails as well
        reason = f"the loss is wrong: {answer.values['loss']:.2f}, where fresh weights have about {fresh:.2f}"
        return replace(row, reason=reason)
    if not answer.values["canary"] <= CANARY:
        return replace(row, reason="the same loss came out differently when repeated")
    if row.memory > budget:
        return replace(row, verdict="too big", reason=f"over the memory budget of {budget / 1e9:.1f} GB")
    if answer.cold:
        return replace(row, verdict="fits", reason=COLD)
    burst = rate(config, row.micro_batch, answer.values["burst_seconds"], updating)
    return replace(row, verdict="fits", burst=round(burst, 1))


def rate(config: RunConfig, micro: int, forward: float, updating: float) -> float:
    """Tokens per second of whole optimiser steps, from the seconds of a micro-batch's passes and of an update."""
    return config.train.tokens_per_step / (config.sequences_per_step / micro * forward + updating)


def variant(config: RunConfig) -> str:
    """What a step does that the plain one does not."""
    machine = config.machine
    words = {"checkpointing": machine.checkpointing, "chunked loss": machine.chunked_loss, "compiled": machine.compile}
    return ", ".join(word for word, on in words.items() if on)


def run_child(
    config: RunConfig, device: Device, budget: int, seconds: float, measure: float = MEASURE_SECONDS
) -> Answer:
    """Start the child, watch it (time, resident memory, swap) and read its answer."""
    request = {"config": for_child(config, device), "fraction": FRACTION, "budget": budget, "seconds": measure}
    swap = psutil.swap_memory().used
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        environment = child_environment()
        with subprocess.Popen(
            CHILD, bufsize=0, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment
        ) as child:
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has died already: its code and its last words say why
                child.stdin.write(json.dumps(request).encode() + b"\n")
            # It stays open: by its end the child knows that this process has died.
            try:
                stopped = _watch(child, budget if device.resident else sys.maxsize, seconds, swap)
            finally:
                child.kill()
        return _answer(child.returncode, stopped, _content(out), _content(err), seconds, measure)


def for_child(config: RunConfig, device: Device) -> dict[str, object]:
    """The settings as JSON tables, with the device's own dtype and threads in them."""
    tables = config.model_dump(exclude_none=True)
    tables["train"].pop("until", None)  # a moment is no JSON, and no matter of one step
    tables["machine"] |= {"device": device.kind, "dtype": device.dtype_name, "threads": device.threads}
    return tables


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


def _answer(code: int, stopped: Answer | None, out: str, err: str, seconds: float, measure: float) -> Answer:
    values = _last_object(out)
    if DRIVER_OUT_OF_MEMORY in err:  # also before a hang, where the first step's answer would be believed
        return Answer({}, "the GPU's driver ran out of memory", out_of_memory=True)
    if stopped and stopped.stopped and "forward_seconds" in values:
        rest = measure + 3 * values["forward_seconds"] + 2 * values["update_seconds"]
        if seconds > CHILD_SECONDS + PATIENCE * rest:
            return Answer({}, f"it hung after the first step ({stopped.failure})", stopped=True)
        return Answer(values, cold=True)
    if stopped:
        return stopped
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


def _content(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return file.read().decode(errors="replace")  # type: ignore[attr-defined]
