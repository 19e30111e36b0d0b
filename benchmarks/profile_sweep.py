"""What `silicon profile` chooses in a minute, against a sweep of the same settings that takes as long as it takes.

    python benchmarks/profile_sweep.py [--presets tiny small medium] [--seconds 3]

For each preset: the profile is measured anew and timed; then every micro-batch is tried plain, and the three fastest
checkpointed, with the loss in chunks, with half the threads, in bfloat16 and compiled, each in a child process of its
own, for longer. The profile's choice is measured in the same way, so that both sides are alike. Prints a table, and a
JSON line a row on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import Any

from siliconlm.config import Layer, RunConfig, read_profile, resolve
from siliconlm.events import Probed
from siliconlm.hardware.device import Device, can_compile, open_device
from siliconlm.tuning.choose import make_profile, settle
from siliconlm.tuning.probe import probe
from siliconlm.tuning.search import sizes

VOCABULARY = 4096
LONGEST_CHILD = 90.0  # seconds: on this machine a larger micro-batch than that cannot be measured
FASTEST = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "checkpointing": {"machine.checkpointing": True},
    "chunked loss": {"machine.chunked_loss": True},
    "half the threads": {"machine.threads": 0},
    "bfloat16": {"machine.dtype": "bfloat16"},
    "compiled": {"machine.compile": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small", "medium"])
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each setting is timed once it is warm")
    given = parser.parse_args()
    sides = [f"{side:34}{'tokens/s':>10}" for side in ("chosen", "best of the sweep")]
    print(f"{'preset':8}{'profile':>9}  {sides[0]}  {sides[1]}{'ratio':>7}")
    for preset in given.presets:
        compare(preset, given.seconds)


def compare(preset: str, seconds: float) -> None:
    config = resolve(read_profile(preset, kind="preset"), Layer("benchmark", {"model.vocab_size": VOCABULARY}))
    device = open_device(config.machine)
    begun = time.monotonic()
    work = make_profile(config, device)
    while True:
        try:
            next(work)
        except StopIteration as end:
            made = end.value
            break
    took = time.monotonic() - begun
    chosen = {name: value for name, value in made.settings.items() if name.startswith("machine.")}
    rows = sweep(settle(config, device), device, seconds)
    same = measure(settle(config, device), device, chosen, seconds)
    rows.append(same)
    best = max((row for row in rows if row.verdict == "fits"), key=lambda row: row.tokens_per_s)
    ratio = same.tokens_per_s / best.tokens_per_s
    print(
        f"{preset:8}{took:>7.0f} s  {words(same, chosen):34}{same.tokens_per_s:>10,.0f}  "
        f"{words(best, {}):34}{best.tokens_per_s:>10,.0f}{ratio:>7.3f}",
        flush=True,
    )
    note(preset=preset, seconds=round(took, 1), chosen=chosen, ratio=round(ratio, 4))


def sweep(config: RunConfig, device: Device, seconds: float) -> list[Probed]:
    """Every size as it is, and the fastest of them with every variant."""
    rows: list[Probed] = []
    for micro in sizes(config):
        rows.append(measure(config, device, {"machine.micro_batch": micro}, seconds))
        note(**rows[-1].as_json())
        if rows[-1].verdict != "fits":
            break
    best = sorted(rows, key=lambda row: -row.tokens_per_s)[:FASTEST]
    for name, changes in VARIANTS.items():
        if name == "compiled" and can_compile(device):
            continue
        threads = {"machine.threads": max(1, device.threads // 2)} if "machine.threads" in changes else {}
        for row in best:
            found = measure(config, device, {**changes, **threads, "machine.micro_batch": row.micro_batch}, seconds)
            note(name=name, **found.as_json())
            rows.append(replace(found, variant=name))
    return rows


def measure(config: RunConfig, device: Device, changes: dict[str, Any], seconds: float) -> Probed:
    changed = config.replace("sweep", **changes)
    return probe(changed, open_device(changed.machine), device.memory_budget(), LONGEST_CHILD, measure=seconds)


def words(row: Probed, settings: dict[str, Any]) -> str:
    threads = f", {settings['machine.threads']} threads" if settings.get("machine.threads") else ""
    return f"{row.micro_batch} x {row.context}, {row.dtype}{threads}" + (f", {row.variant}" if row.variant else "")


def note(**values: object) -> None:
    print(json.dumps(values), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
