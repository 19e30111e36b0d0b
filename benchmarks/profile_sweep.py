"""What `silicon profile` chooses in a minute, against a sweep of the same settings that takes as long as it takes.

    python benchmarks/profile_sweep.py [--presets tiny small medium] [--seconds 3]

For each preset: the profile is measured anew and timed; then every micro-batch is tried plain, and the three fastest
checkpointed, with the loss in chunks, with half the threads, in bfloat16 and compiled, each in a child process of its
own, for longer. Then the profile's choice and the best of the sweep take turns, five times each, and their medians
make the ratio: the best of many single tries is in part luck, and the machine's speed drifts meanwhile. Prints a
table, and a JSON line a row on stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
TURNS = 5
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
    best, changes = max(rows, key=lambda row: row[0].tokens_per_s)
    duel: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(TURNS):
        for side, settings in (("ours", chosen), ("theirs", changes)):
            row = measure(settle(config, device), device, settings, seconds)
            duel[side].append(row.tokens_per_s)
    ours, theirs = map(statistics.median, duel.values())
    ratio = ours / theirs
    same = replace(best, micro_batch=chosen["machine.micro_batch"], dtype=chosen["machine.dtype"], variant="")
    print(
        f"{preset:8}{took:>7.0f} s  {words(same, chosen):34}{ours:>10,.0f}  "
        f"{words(best, {}):34}{theirs:>10,.0f}{ratio:>7.3f}",
        flush=True,
    )
    note(preset=preset, seconds=round(took, 1), chosen=chosen, best=changes, ratio=round(ratio, 4), **duel)


def sweep(config: RunConfig, device: Device, seconds: float) -> list[tuple[Probed, dict[str, Any]]]:
    """Every size as it is, and the fastest of them with every variant: what fits, and its settings."""
    rows: list[tuple[Probed, dict[str, Any]]] = []

    def take(changes: dict[str, Any], name: str = "") -> bool:
        row = measure(config, device, changes, seconds)
        note(name=name, **row.as_json())
        if row.verdict == "fits":
            rows.append((replace(row, variant=name), changes))
        return row.verdict == "fits"

    for micro in sizes(config):
        if not take({"machine.micro_batch": micro}):
            break
    best = sorted(rows, key=lambda row: -row[0].tokens_per_s)[:FASTEST]
    for name, changes in VARIANTS.items():
        if name == "compiled" and can_compile(device):
            continue
        threads = {"machine.threads": max(1, device.threads // 2)} if "machine.threads" in changes else {}
        for _, size in best:
            if not take({**changes, **threads, **size}, name):
                break  # too slow, or too big: so it will be for the others
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
