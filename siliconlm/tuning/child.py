"""The child process of a probe: one setting, real training steps, one JSON line. Run as `python -m`.

Reads {"config": tables, "fraction": F, "seconds": S} on stdin. Writes {"memory", "step_seconds", "canary"} or
{"error", "out_of_memory"} as the last line of stdout. Dies alone if memory runs out for good.
"""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import torch

from siliconlm.config import Layer, RunConfig, flatten, resolve
from siliconlm.data.shards import Tokens
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import is_out_of_memory, open_device
from siliconlm.training.loop import accumulate, train_step, update
from siliconlm.training.state import TrainState


def measure(config: RunConfig, fraction: float, seconds: float) -> dict[str, float]:
    """Peak memory in bytes, and the seconds one whole optimiser step takes, warm and with the device waited for.

    A step is `accumulation` micro-batches and one update. Both parts are timed apart, so a slow machine need not run
    all the micro-batches to know what they cost.
    """
    device = open_device(config.machine)
    device.cap_memory(fraction)
    device.forget_peak()
    state = TrainState.new(config, device)
    micro = config.machine.micro_batch
    assert micro is not None
    sequences = _random_sequences(config, micro)
    loss, _ = train_step(state, sequences, 0.0)  # warm up: optimiser state, kernels; a rate of 0 changes no weight
    canary = float(loss)
    device.synchronise()
    forward, step = _timed(state, sequences, seconds)
    again = float(accumulate(state, sequences))
    accumulation = config.sequences_per_step // micro
    return {
        "memory": device.peak_memory(),
        "step_seconds": accumulation * forward + step,
        "canary": abs(again - canary) if math.isfinite(canary) else math.inf,
    }


def _timed(state: TrainState, sequences: Tokens, seconds: float) -> tuple[float, float]:
    """Median seconds of forward and backward of one micro-batch, and of the update, over about `seconds`."""
    forwards: list[float] = []
    updates: list[float] = []
    end = time.perf_counter() + seconds
    while not forwards or time.perf_counter() < end:
        begun = time.perf_counter()
        accumulate(state, sequences)
        state.device.synchronise()
        middle = time.perf_counter()
        update(state, 0.0)
        state.device.synchronise()
        forwards.append(middle - begun)
        updates.append(time.perf_counter() - middle)
    return float(np.median(forwards)), float(np.median(updates))


def _random_sequences(config: RunConfig, count: int) -> Tokens:
    shape = (count, config.model.context + 1)
    return np.random.default_rng(config.train.seed).integers(0, config.model.vocab_size, shape)


def main() -> None:
    request = json.load(sys.stdin)
    config = resolve(Layer("probe", flatten(request["config"], "probe")))
    try:
        answer: dict[str, object] = dict(measure(config, request["fraction"], request["seconds"]))
    except SiliconError as error:
        answer = {"error": str(error), "out_of_memory": False}
    except (RuntimeError, MemoryError) as error:
        answer = {"error": str(error).split("\n")[0], "out_of_memory": is_out_of_memory(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
