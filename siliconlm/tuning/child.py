"""The child process of a probe: one setting, real training steps, JSON lines. Run as `python -P -m`.

Reads {"config": tables, "fraction": F, "seconds": S} on stdin. Writes {"memory", "step_seconds", "canary"} after the
first step, still cold, and again measured warm; or {"error", "out_of_memory"}. The last line of stdout counts. Dies
alone if memory runs out for good.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from siliconlm.config import Layer, RunConfig, flatten, resolve
from siliconlm.data.shards import Tokens
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import is_out_of_memory, open_device, plain_words
from siliconlm.training.loop import accumulate, evaluation_batch, to_device, update
from siliconlm.training.state import TrainState


def measure(config: RunConfig, fraction: float, seconds: float) -> Iterator[dict[str, float]]:
    """Peak memory in bytes and the seconds of one whole optimiser step: of the first step, then warm.

    A step is `accumulation` micro-batches and one update. Both parts are timed apart, so a slow machine need not run
    all the micro-batches to know what they cost; but two where there are two, for the second needs most memory: it
    runs beside the gradients of the first. The canary is how far the same loss, computed again, is off.
    """
    device = open_device(config.machine)
    device.cap_memory(fraction)
    device.forget_peak()
    state = TrainState.new(config, device)
    micro = config.machine.micro_batch
    assert micro is not None
    accumulation = config.sequences_per_step // micro
    part = min(2, accumulation)
    sequences = _random_sequences(config, part * micro)
    first, forward, step = _timed_step(state, sequences)
    yield {"memory": device.peak_memory(), "step_seconds": accumulation / part * forward + step, "canary": 0.0}
    end = time.perf_counter() + seconds
    times = [_timed_step(state, sequences)[1:]]
    while time.perf_counter() < end:
        times.append(_timed_step(state, sequences)[1:])
    forward, step = np.median(times, axis=0).tolist()
    _evaluate(state)
    canary = abs(float(accumulate(state, sequences)) - first)
    yield {"memory": device.peak_memory(), "step_seconds": accumulation / part * forward + step, "canary": canary}


def _timed_step(state: TrainState, sequences: Tokens) -> tuple[float, float, float]:
    """The loss of some sequences, and the seconds of their passes and of an update.

    At a rate of 0 no weight changes, and without counting steps dropout stays the same, so the loss repeats.
    """
    begun = time.perf_counter()
    loss = accumulate(state, sequences)
    state.device.synchronise()
    middle = time.perf_counter()
    update(state, 0.0)
    state.device.synchronise()
    return float(loss), middle - begun, time.perf_counter() - middle


def _evaluate(state: TrainState) -> None:
    """One batch of an evaluation: where the micro-batch is small it needs more memory than a training step."""
    config = state.config
    batch = evaluation_batch(config.model.context, config.machine.micro_batch)
    ids, targets = to_device(_random_sequences(config, batch), state.device)
    state.model.eval()
    with state.averaged(), torch.no_grad(), state.device.autocast():
        state.model.losses(ids, targets)
    state.model.train()


def _random_sequences(config: RunConfig, count: int) -> Tokens:
    shape = (count, config.model.context + 1)
    return np.random.default_rng(config.train.seed).integers(0, config.model.vocab_size, shape)


def main() -> None:
    request = json.load(sys.stdin)
    config = resolve(Layer("probe", flatten(request["config"], "probe")))
    try:
        for answer in measure(config, request["fraction"], request["seconds"]):
            print(json.dumps(answer), flush=True)
    except SiliconError as error:
        print(json.dumps({"error": str(error), "out_of_memory": False}), flush=True)
    except (RuntimeError, MemoryError) as error:
        print(json.dumps({"error": plain_words(error), "out_of_memory": is_out_of_memory(error)}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # an interpreter that ends right after a backward pass can be aborted by autograd's device thread
