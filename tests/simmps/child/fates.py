"""What can happen to a probe's child on an Apple GPU, done to it on purpose. `sitecustomize` calls `await_them` there.

SIMMPS_FATES is "SEED:FOLDER". With one chance in two the first try of a micro-batch meets a fate that the second does not
meet; and where memory really runs out, that may come as any fate instead of an error. FOLDER has a file for each that struck.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FATES = ("out of memory", "driver", "killed", "hanging", "wrong numbers")
DRIVER = "Execution of the command buffer was aborted due to an error during execution. Insufficient Memory (00000008)"


def await_them() -> None:
    """Read the probe's question, put it back, and let the passes of this process meet their fate."""
    from siliconlm.training import loop

    seed, folder = os.environ["SIMMPS_FATES"].split(":", 1)
    question = sys.stdin.read()
    sys.stdin = io.StringIO(question)
    micro = json.loads(question)["config"]["machine"]["micro_batch"]
    struck = Path(folder)
    drawn = random.Random(f"{seed} {micro}")
    transient, fate, at_pass, at_the_end = (
        drawn.random() < 0.5,
        drawn.choice(FATES),
        drawn.randint(1, 3),
        drawn.choice(FATES),
    )
    first_try = transient and not list(struck.glob(f"{micro} by chance*"))
    loop.accumulate = meeting(loop.accumulate, struck, micro, fate if first_try else "", at_pass, at_the_end)


def meeting(work: Callable[..., Any], struck: Path, micro: int, fate: str, at_pass: int, at_the_end: str) -> Any:
    passes = 0

    def accumulate(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if fate and passes == at_pass:
            (struck / f"{micro} by chance: {fate}").touch()
            if fate == "out of memory":
                torch.mps.set_per_process_memory_fraction(1e-6)  # the allocator itself will raise
            else:
                return strike(fate)
        try:
            return work(*arguments)
        except RuntimeError as error:
            if "out of memory" not in str(error) or fate == "out of memory":
                raise
            (struck / f"{micro} for want of memory: {at_the_end}").touch()
            if at_the_end == "out of memory":
                raise
            return strike(at_the_end)

    return accumulate


def strike(fate: str) -> torch.Tensor:
    """The process ends or hangs here, or goes on with a loss that means nothing."""
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "hanging":
        signal.pause()
    if fate == "driver":
        print(DRIVER, file=sys.stderr, flush=True)
    return torch.rand(()) * 10
