"""Whether `--time` keeps its word: wall time from the first step to the end of the command, five times, and five more
while another process takes one core for half of the time.

    silicon prepare input.txt --name shakespeare --tokenizer char
    python benchmarks/deadline.py [--time 60] [--times 5]

Prints a line and a JSON line (on stderr) a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

SPIN = "import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=float, default=60.0)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    print(f"{'machine':10}{'first step to end':>20}{'steps':>8}{'val_loss':>10}")
    for busy in (False, True):
        for _ in range(given.times):
            run(given.time, busy)


def run(budget: float, busy: bool) -> None:
    command = [sys.executable, "-m", "siliconlm", "train", "--data", "shakespeare", "--preset", "tiny"]
    command += ["--profile", "none", "--time", f"{budget:g}s", "--json"]
    first = 0.0
    other = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "started":  # the first step begins now; the steps' own lines come in bundles
                first = time.monotonic()
                if busy:
                    other = subprocess.Popen([sys.executable, "-c", SPIN.format(seconds=budget / 2)])
    took = time.monotonic() - first
    if other:
        other.wait()
    row = {"busy": busy, "budget": budget, "seconds": round(took, 2), "steps": event["step"], "loss": event["val_loss"]}
    print(f"{'busy' if busy else 'idle':10}{took:>18.1f} s{row['steps']:>8}{row['loss']:>10.4f}", flush=True)
    print(json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
