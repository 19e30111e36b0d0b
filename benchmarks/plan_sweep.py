"""The runs that the plan's loss model is fitted on: every rung of the ladder, for the tokens that a time pays for.

    silicon prepare input.txt --name shakespeare --tokenizer char
    python benchmarks/plan_sweep.py rates          # tokens/s of each rung, on an idle machine
    python benchmarks/plan_sweep.py runs           # each rung at 30 s, 2 min and 5 min

The runs have budgets in tokens, computed from the rates, so that what else runs on the machine changes how long they
take and not what they reach. One JSON line a figure is added to benchmarks/results/plan_sweep.jsonl; what is there
already is not done again.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from siliconlm.tuning.planner import LADDER, Rung, step_tokens

RESULTS = Path(__file__).parent / "results" / "plan_sweep.jsonl"
BUDGETS = (30.0, 120.0, 300.0)
RATE_SECONDS = 12
FIRST_STEP = 1.7  # seconds: torch imports its compiler at the first optimiser step
EVALUATIONS = 0.03  # of the time
EVALUATION_SPEED = 2.5  # times the training speed
VALIDATION_TOKENS = 111_540
LARGEST = 7  # rungs: bigger ones would make a handful of steps in five minutes


def main() -> None:
    if sys.argv[1:] not in (["rates"], ["runs"]):
        sys.exit(__doc__)
    RESULTS.parent.mkdir(exist_ok=True)
    rungs = LADDER[:LARGEST]
    if sys.argv[1] == "rates":
        for rung in rungs:
            for per_step in (2048, 4096):
                rate(rung, per_step)
        return
    for budget in BUDGETS:
        for rung in rungs:
            run(rung, budget)


def rate(rung: Rung, per_step: int) -> float:
    """Training tokens per second, measured once."""
    known = [row for row in rows("rate") if row["rung"] == rung.name and row["tokens_per_step"] == per_step]
    if known:
        return float(known[0]["tokens_per_s"])
    finished = train(rung, per_step, ["--time", f"{RATE_SECONDS}s"])
    note(kind="rate", rung=rung.name, tokens_per_step=per_step, tokens_per_s=finished["tokens_per_s"])
    return float(finished["tokens_per_s"])


def run(rung: Rung, budget: float) -> None:
    """Train for the tokens of a budget in seconds; note the loss on the whole validation split."""
    if any(row["rung"] == rung.name and row["seconds"] == budget for row in rows("run")):
        return
    speed = rate(rung, 2048)
    final = min(0.1 * budget, VALIDATION_TOKENS / (EVALUATION_SPEED * speed))
    usable = (1 - EVALUATIONS) * budget - FIRST_STEP - final
    per_step = step_tokens(rung, speed * usable)
    tokens = int(rate(rung, per_step) * usable)
    finished = train(rung, per_step, ["--tokens", str(tokens), "--set", "train.eval_every=1000000"])
    note(
        kind="run",
        rung=rung.name,
        seconds=budget,
        tokens_per_step=per_step,
        tokens=finished["tokens"],
        val_loss=finished["val_loss"],
        parameters=finished["parameters"],
    )


def train(rung: Rung, per_step: int, budget: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "siliconlm",
        "train",
        "--data",
        "shakespeare",
        "--profile",
        "none",
        "--json",
        *budget,
    ]
    for name, value in rung.layer(per_step).values.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    started = next(event for event in events if event["event"] == "started")
    return events[-1] | {"parameters": started["parameters"]}


def rows(kind: str) -> list[dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def note(**values: object) -> None:
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    line = json.dumps(values | machine)
    print(line, flush=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
