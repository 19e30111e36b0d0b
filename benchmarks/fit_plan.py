"""Fit the plan's loss model to the runs of plan_sweep.py, and say how far it is off.

    python benchmarks/fit_plan.py

Prints the constants for siliconlm/tuning/planner.py, the error of the fit, the error of each run predicted from all
others, and for each time budget what the plan would choose against the best of the sweep.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from siliconlm.tuning.planner import LossModel

RUNS = Path(__file__).parent / "results" / "plan_sweep.jsonl"
UNIQUE = 1_003_854  # training tokens of tiny Shakespeare
VOCABULARY = 128
WORST = 0.4  # nats above the best of its budget: such runs decide nothing
EXPONENTS = np.arange(0.1, 1.01, 0.05)
PATIENCE = (5.0, 10.0, 15.0, 25.0, 40.0, 100.0)


def fit(rows: list[dict[str, Any]]) -> LossModel:
    """Least squares over the losses: the three factors exactly, the exponents and the patience on a grid."""
    losses = np.array([row["val_loss"] for row in rows])
    best, found = math.inf, None
    for alpha, beta, patience in itertools.product(EXPONENTS, EXPONENTS, PATIENCE):
        shape = LossModel(0.0, 1.0, alpha, 1.0, beta, patience)
        columns = [[1.0, row["size"] ** -alpha, shape.worth(row["tokens"], UNIQUE) ** -beta] for row in rows]
        factors, *_ = np.linalg.lstsq(np.array(columns), losses, rcond=None)
        error = float(np.square(np.array(columns) @ factors - losses).sum())
        if error < best and min(factors) >= 0:
            floor, size_factor, token_factor = map(float, factors)
            best, found = error, LossModel(floor, size_factor, float(alpha), token_factor, float(beta), patience)
    assert found is not None
    return found


def read_runs() -> list[dict[str, Any]]:
    """The runs of the sweep, with their parameters outside the embedding."""
    rows = [row for row in map(json.loads, RUNS.read_text().splitlines()) if row["kind"] == "run"]
    return [row | {"size": row["parameters"] - VOCABULARY * int(row["rung"].split("x")[1])} for row in rows]


def used(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs near enough to the best of their budget to decide anything."""
    lowest = {row["seconds"]: math.inf for row in rows}
    for row in rows:
        lowest[row["seconds"]] = min(lowest[row["seconds"]], row["val_loss"])
    return [row for row in rows if row["val_loss"] < lowest[row["seconds"]] + WORST]


def main() -> None:
    every = read_runs()
    rows = used(every)
    model = fit(rows)
    print(model)
    errors = [model.loss(row["size"], row["tokens"], UNIQUE) - row["val_loss"] for row in rows]
    print(f"{len(rows)} of {len(every)} runs; root mean square {np.std(errors):.4f}, worst {max(map(abs, errors)):.4f}")
    left_out = [
        fit([other for other in rows if other is not row]).loss(row["size"], row["tokens"], UNIQUE) - row["val_loss"]
        for row in rows
    ]
    print(f"each from the others: mean {np.mean(np.abs(left_out)):.4f}, worst {max(map(abs, left_out)):.4f} nats")
    for budget in sorted({row["seconds"] for row in every}):
        others = fit([row for row in rows if row["seconds"] != budget])
        mine = [row for row in every if row["seconds"] == budget]
        lowest = min(row["val_loss"] for row in mine)
        chosen = min(mine, key=lambda row: others.loss(row["size"], row["tokens"], UNIQUE))
        print(f"{budget:.0f} s, predicted from the other budgets:")
        for row in mine:
            guess = others.loss(row["size"], row["tokens"], UNIQUE)
            mark = "<- chosen" if row is chosen else ""
            print(f"  {row['rung']:>6} {row['tokens']:>11,} tokens  {row['val_loss']:.4f}  {guess:.4f} {mark}")
        print(f"  {chosen['val_loss'] - lowest:.4f} nats above the best of {len(mine)}")


if __name__ == "__main__":
    main()
