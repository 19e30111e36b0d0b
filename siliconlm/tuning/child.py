"""The child process of a probe: one setting, real training steps, JSON lines. Run as `python -P -m`.

Reads {"config": tables, "fraction": F, "budget": bytes, "seconds": S}, a line on stdin. Writes {"memory", "loss",
"forward_seconds", "update_seconds", "canary"} after the first step, still cold, and again measured warm; or {"error",
"out_of_memory"}. The last line of stdout counts. Dies alone if memory runs out for good, and with its parent.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from siliconlm.config import Layer, RunConfig, flatten, resolve
from siliconlm.data.batches import Batch
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import is_out_of_memory, open_device, plain_words
from siliconlm.training.loop import accumulate, evaluation_batch, to_device, update
from siliconlm.training.state import TrainState

LONG_PASS = 3.0  # seconds
SLACK = 1 << 30  # address space that threads and libraries reserve and never touch


def measure(config: RunConfig, fraction: float, budget: int, seconds: float) -> Iterator[dict[str, float]]:
    """Peak memory in bytes, and the seconds of one micro-batch's passes and of one update: cold, then warm.

    The first step has two micro-batches where training has two or more, for the second needs most memory: it runs
    beside the gradients of the first. After that one micro-batch a step tells the speed, so that a slow machine need
    not run all of them. `burst_seconds` is a micro-batch's time in the first tenth of the measurement. The canary is
    how far the same loss, computed again, is off; it is looked at in every step.
    """
    device = open_device(config.machine)
    device.cap_memory(fraction, budget + SLACK)
    device.forget_peak()
    state = TrainState.new(config, device)
    micro = config.machine.micro_batch
    assert micro is not None
    batch = _random_batch(config, micro)
    loss, forward = _timed(state, batch)
    passes: list[float] = []
    updates: list[float] = []
    deviations: list[float] = []
    if micro < config.sequences_per_step:
        again, forward = _timed(state, batch)
        passes.append(forward)
        deviations.append(abs(again - loss))
    updating = _timed_update(state)
    yield _answer(device.peak_memory(), loss, forward, updating, max(deviations, default=0.0))
    # A second pass of many seconds is measurement enough, though its update was the first and a little slow.
    end = time.perf_counter() + (seconds if forward < LONG_PASS or not passes else 0.0)
    while not passes or time.perf_counter() < end:
        again, forward = _timed(state, batch)
        deviations.append(abs(again - loss))
        passes.append(forward)
        updates.append(_timed_update(state))
    updates = updates or [updating]
    rows = evaluation_batch(config.model.context, micro)
    if rows > micro:
        evaluate_once(state, _random_batch(config, rows))
    burst = float(np.median(passes[: max(1, len(passes) // 10)]))
    canary = float(np.max(deviations))  # NaN where one is
    answer = _answer(device.peak_memory(), loss, float(np.median(passes)), float(np.median(updates)), canary)
    yield answer | {"burst_seconds": burst}


def _answer(memory: int, loss: float, forward: float, updating: float, canary: float) -> dict[str, float]:
    values = {"memory": memory, "loss": loss, "forward_seconds": forward, "update_seconds": updating, "canary": canary}
    return {name: value if math.isfinite(value) else math.nan for name, value in values.items()}


def _timed(state: TrainState, batch: Batch) -> tuple[float, float]:
    """The mean loss of a micro-batch and the seconds of its passes."""
    begun = time.perf_counter()
    loss = accumulate(state, batch)
    state.device.synchronise()
    return float(loss), time.perf_counter() - begun


def _timed_update(state: TrainState) -> float:
    """The seconds of an update. At a rate of 0 no weight changes, and without counting steps dropout stays the same,
    so the loss repeats."""
    begun = time.perf_counter()
    update(state, 0.0)
    state.device.synchronise()
    return time.perf_counter() - begun


def evaluate_once(state: TrainState, batch: Batch) -> None:
    """One batch of an evaluation: where the micro-batch is small it needs more memory than a training step."""
    state.model.eval()
    with state.averaged(), torch.no_grad(), state.device.autocast():
        state.model.losses(*to_device(batch, state.device))
    state.model.train()


def _random_batch(config: RunConfig, count: int) -> Batch:
    shape = (count, config.model.context + 1)
    tokens = np.random.default_rng(config.train.seed).integers(0, config.model.vocab_size, shape)
    return Batch.of(tokens, apart=config.data.document_mask)


def die_with_parent() -> None:
    """The parent holds the other end of stdin as long as it lives.

    Not sys.stdin.read(): an interpreter that ends while a thread waits in there is aborted.
    """
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=die_with_parent, daemon=True).start()
    config = resolve(Layer("probe", flatten(request["config"], "probe")))
    try:
        for answer in measure(config, request["fraction"], request["budget"], request["seconds"]):
            print(json.dumps(answer), flush=True)
    except SiliconError as error:
        print(json.dumps({"error": str(error), "out_of_memory": False}), flush=True)
    except (RuntimeError, MemoryError) as error:
        print(json.dumps({"error": plain_words(error), "out_of_memory": is_out_of_memory(error)}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # an interpreter that ends right after a backward pass can be aborted by autograd's device thread
