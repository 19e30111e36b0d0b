"""Peak memory as forecast beside peak memory as measured by the probe's child, on this machine's CPU.

    python benchmarks/memory_forecast.py [--presets tiny small medium] [--micro-batches 1 4] [--threads 1]

Prints a table, and one JSON line per row on stderr. Steps have one micro-batch, as the probe's child has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from siliconlm.config import Layer, RunConfig, read_profile, resolve
from siliconlm.hardware.device import open_device
from siliconlm.tuning.memory import forecast_process
from siliconlm.tuning.probe import run_child

MIB = 1 << 20


def configured(preset: str, micro: int, checkpointing: bool, threads: int) -> RunConfig:
    """A preset with the default vocabulary of a prepared dataset and one micro-batch a step."""
    shape = read_profile(preset, kind="preset")
    machine = {"device": "cpu", "dtype": "float32", "threads": threads, "micro_batch": micro}
    settings = {f"machine.{name}": value for name, value in machine.items()}
    settings |= {"machine.checkpointing": checkpointing, "model.vocab_size": 4096}
    settings |= {"train.tokens_per_step": micro * shape.values["model.context"]}
    return resolve(shape, Layer("benchmark", settings))


def rows(presets: list[str], micros: list[int], threads: int) -> Iterator[dict[str, Any]]:
    for preset in presets:
        for micro in micros:
            for checkpointing in (False, True):
                config = configured(preset, micro, checkpointing, threads)
                device = open_device(config.machine)
                begun = time.perf_counter()
                predicted = forecast_process(config, device)
                took = time.perf_counter() - begun
                answer = run_child(config, device, 1 << 40, 600.0)
                if answer.failure:
                    raise SystemExit(f"{preset}, micro-batch {micro}: {answer.failure}")
                measured = int(answer.values["memory"])
                yield {
                    "preset": preset,
                    "micro_batch": micro,
                    "checkpointing": checkpointing,
                    "tensors": predicted.peak,
                    "predicted": predicted.resident,
                    "measured": measured,
                    "ratio": round(predicted.resident / measured, 3),
                    "seconds": round(took, 1),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small", "medium"])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(f"{'preset':8}{'micro':>6}{'ckpt':>6}{'tensors':>10}{'predicted':>11}{'measured':>10}{'ratio':>7}{'took':>8}")
    worst = 0.0
    for row in rows(given.presets, given.micro_batches, given.threads):
        sizes = "".join(f"{row[name] // MIB:>{width}}" for name, width in (("tensors", 10), ("predicted", 11)))
        print(
            f"{row['preset']:8}{row['micro_batch']:>6}{'on' if row['checkpointing'] else 'off':>6}{sizes}"
            f"{row['measured'] // MIB:>10}{row['ratio']:>7.2f}{row['seconds']:>6.1f} s",
            flush=True,
        )
        print(json.dumps(row), file=sys.stderr, flush=True)
        worst = max(worst, abs(row["ratio"] - 1))
    print(f"MiB; the worst is {worst:.0%} off")


if __name__ == "__main__":
    main()
