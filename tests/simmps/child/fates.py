"""What can happen to a probe's child on an Apple GPU, done to it on purpose; `sitecustomize` calls `await_them` there.

SIMMPS_FATES is "SEED:FOLDER". With one chance in two the first try of a micro-batch meets a fate that the second does
not meet. Where memory runs out, that too may come as any fate instead of an error. FOLDER has a file for each that
struck.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch

FATES = ("out of memory", "driver", "killed", "hanging", "wrong numbers")
DRIVER = "Execution of the command buffer was aborted due to an error during execution. Insufficient Memory (00000008)"


def await_them() -> None:
    """Read the probe's question, put it back, and let the passes of this process meet what is drawn for it."""
    from siliconlm.training import loop

    seed, folder = os.environ["SIMMPS_FATES"].split(":", 1)
    question = sys.stdin.readline()
    sys.stdin = io.StringIO(question)
    micro = json.loads(question)["config"]["machine"]["micro_batch"]
    drawn = random.Random(f"{seed} {micro}")
    by_chance, in_want = drawn.choice(FATES), drawn.choice(FATES)
    struck_pass = drawn.randint(1, 3) if drawn.random() < 0.5 else 0  # none is the 0th
    known, lacking = (Path(folder) / f"{micro}, {fate}" for fate in (f"{by_chance} by chance", f"{in_want} in want"))
    if known.exists():
        struck_pass = 0
    work, passes = loop.accumulate, 0

    def accumulate(*arguments: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == struck_pass:
            known.touch()
            return strike(by_chance)
        try:
            return work(*arguments)
        except RuntimeError as error:
            assert "out of memory" in str(error)
            lacking.touch()
            return strike(in_want)

    loop.accumulate = accumulate


def strike(fate: str) -> torch.Tensor:
    """The process ends or hangs here, or goes on with a loss that means nothing."""
    if fate == "out of memory":
        torch.empty(8 * torch.mps.recommended_max_memory(), device="mps")  # for the allocator's own words
    if fate == "driver":
        print(DRIVER, file=sys.stderr, flush=True)
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "hanging":
        signal.pause()
    return torch.tensor(10 * random.random())  # torch's own numbers repeat, for every pass seeds them
