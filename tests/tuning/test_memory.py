"""What training will need, computed without training: against a hand computation, and against a process that trains."""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil
import pytest
import torch

from siliconlm.config import Layer, RunConfig, read_profile, resolve
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import Device
from siliconlm.model.decoder import Decoder
from siliconlm.tuning import memory
from siliconlm.tuning.memory import BLOCK, Malloc, forecast, forecast_process
from siliconlm.tuning.probe import run_child

SHAPE = {"model.n_layer": 2, "model.n_embd": 64, "model.n_head": 4, "model.n_kv_head": 2, "model.head_dim": 16}
SHAPE |= {"model.n_ff": 96, "model.vocab_size": 320, "model.context": 256}
SHAPE |= {"machine.device": "cpu", "machine.threads": 1}
CPU = Device("cpu", torch.float32, 1)
APPLE = Device("mps", torch.float32, 1)


@pytest.fixture(autouse=True)
def sound_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Apple GPU of these tests; those about wrong matmuls say that it is one that has them."""
    monkeypatch.setattr("siliconlm.hardware.device.processor_name", lambda kind: "Apple M4")


def configured(micro: int = 8, micro_batches: int = 1, **changes: Any) -> RunConfig:
    """A small run of `micro_batches` a step; settings by dotted name, two underscores for the dot, lie on top."""
    values = {**SHAPE, **{name.replace("__", "."): value for name, value in changes.items()}}
    values |= {"machine.micro_batch": micro, "train.tokens_per_step": micro * micro_batches * values["model.context"]}
    return resolve(Layer("test", values))


def blocks(*sizes: int) -> int:
    """Bytes that tensors of so many float32 numbers take."""
    return sum(-(-4 * size // BLOCK) * BLOCK for size in sizes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_weights_and_optimizer_state_are_exact(optimiser: str, tied: bool) -> None:
    config = configured(optim__name=optimiser, model__tied=tied)
    found = forecast(config, CPU)
    weights = dict(Decoder(config.model).named_parameters())
    angles = 256 * 16
    assert found.weights == blocks(*(weight.numel() for weight in weights.values()), angles, angles)
    inner = [weight for name, weight in weights.items() if ".layers." in name and weight.dim() == 2]
    state = [weight.numel() for weight in weights.values() for _ in range(2)]
    counters = [1] * len(weights)
    if optimiser == "muon":  # one momentum, and one of mean squares, for all matrices of a shape; AdamW has the rest
        others = {id(weight) for weight in inner}
        state = [weight.numel() for weight in weights.values() if id(weight) not in others for _ in range(2)]
        for shape in {weight.shape for weight in inner}:
            alike = [weight for weight in inner if weight.shape == shape]
            state += [sum(weight.numel() for weight in alike), len(alike) * max(shape)]
        counters = [1] * (len(weights) - len(inner))
    assert found.optimizer_state == blocks(*state, *counters)
    assert found.peak == found.weights + found.gradients + found.optimizer_state + found.activations


def test_the_average_counts_as_weights() -> None:
    plain, averaged = forecast(configured(), CPU), forecast(configured(train__ema=0.99), CPU)
    angles = 2 * blocks(256 * 16)
    assert averaged.weights == 2 * plain.weights - angles


def test_activations_grow_with_the_micro_batch_in_a_line() -> None:
    small, middle, large = (forecast(configured(micro), CPU).peak for micro in (16, 32, 64))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.002)
    logits = 256 * 320 * 4
    assert (large - middle) / 32 > 2 * logits  # the logits and their gradient, and what the blocks keep


def test_gradients_wait_while_the_next_micro_batch_runs() -> None:
    one, two, many = (forecast(configured(8, count), CPU) for count in (1, 2, 50))
    assert one.gradients < two.gradients == pytest.approx(one.weights, rel=0.2)
    assert many == two


def test_checkpointing_needs_less() -> None:
    shape = {"model__n_layer": 6, "model__vocab_size": 64}
    plain, recomputed = (forecast(configured(16, machine__checkpointing=on, **shape), CPU) for on in (False, True))
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.weights == plain.weights


def test_half_precision_needs_less() -> None:
    halved = forecast(configured(32), Device("cpu", torch.bfloat16, 1))
    assert halved.activations < 0.9 * forecast(configured(32), CPU).activations


def test_scaled_half_precision_can_be_forecast() -> None:
    assert forecast(configured(), Device("mps", torch.float16, 1)).peak > 0


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_adamw_that_is_not_fused_can_be_forecast(optimiser: str) -> None:
    apart = forecast(configured(optim__name=optimiser, machine__fused=False), CPU)
    assert apart == forecast(configured(optim__name=optimiser), CPU)


def test_apple_gpus_hold_a_blocks_scores_of_one_layer() -> None:
    """Where torch's attention would keep all of them, of all layers."""
    scores = 2 * 4 * 1024**2 * 4  # B H T T, in float32

    def extra(layers: int) -> int:
        config = configured(2, model__context=1024, model__n_layer=layers)
        return forecast(config, APPLE).peak - forecast(config, CPU).peak

    assert 0 < extra(2) < scores
    assert extra(4) - extra(2) < 0.1 * scores


def test_a_long_vocabulary_is_a_hazard_on_m1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siliconlm.hardware.device.wrong_long_matmuls", lambda: True)
    found = forecast(configured(1, model__vocab_size=50_257), APPLE).hazards
    assert found == ["a matmul over 50,257 terms (256 x 64) is silently wrong (pytorch#177116)"]
    assert not forecast(configured(1, model__vocab_size=32_000), APPLE).hazards
    assert not forecast(configured(1, model__vocab_size=50_257), CPU).hazards


def test_many_tokens_are_a_hazard_on_m1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siliconlm.hardware.device.wrong_long_matmuls", lambda: True)
    assert any("over 32,768 terms" in hazard for hazard in forecast(configured(128), APPLE).hazards)


def test_a_tensor_of_4_gib_is_a_hazard_on_apple_gpus() -> None:
    shape = {"model__context": 1024, "model__vocab_size": 32_768}
    (found,) = forecast(configured(32, **shape), APPLE).hazards  # views of one storage are one tensor
    assert found.startswith("a tensor of 4.0 GiB (") and "#149325" in found
    assert not forecast(configured(31, **shape), APPLE).hazards
    assert not forecast(configured(32, **shape), CPU).hazards


def test_a_large_model_takes_seconds_and_no_memory() -> None:
    shape = read_profile("large", kind="preset")
    settings = {"model.vocab_size": 50_257, "machine.micro_batch": 64}
    config = resolve(shape, Layer("test", settings))
    forecast(configured(), CPU)  # what is imported along the way
    before, begun = psutil.Process().memory_info().rss, time.perf_counter()
    found = forecast(config, CPU)
    assert time.perf_counter() - begun < 15
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert found.peak > 50e9


@pytest.mark.skipif(Malloc.of_glibc() is None, reason="not glibc")
def test_malloc_is_asked_but_not_touched() -> None:
    malloc = Malloc.of_glibc()
    assert malloc is not None
    before = psutil.Process().memory_info().rss
    malloc.allocate(1, 1 << 30)
    malloc.allocate(2, 1 << 60)  # refused, but counted
    malloc.free(2)
    malloc.allocate(3, 1 << 20)
    assert psutil.Process().memory_info().rss - before < 8 << 20
    assert (1 << 60) + (1 << 30) <= malloc.peak < (1 << 60) + (1 << 31)
    malloc.free(1)
    malloc.free(3)
    assert not malloc.pieces and malloc.mapped == 0


@pytest.mark.parametrize(
    ("code", "words"), [("raise SystemExit('no room')", "no room"), ("import time; time.sleep(9)", "too long")]
)
def test_a_forecast_that_fails_says_so(code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHILD", (sys.executable, "-c", code))
    with pytest.raises(SiliconError, match=words):
        forecast_process(configured(), CPU, seconds=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_process_needs_what_was_forecast(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shape = read_profile("tiny", kind="preset")
    settings = {"model.vocab_size": 4096, "machine.micro_batch": 16, "train.tokens_per_step": 16 * 128}
    settings |= {"machine.checkpointing": checkpointing, "machine.device": "cpu", "machine.threads": 1}
    config = resolve(shape, Layer("test", settings))
    found = forecast_process(config, CPU)
    answer = run_child(config, CPU, 8 << 30, 120.0)
    assert found.resident == pytest.approx(answer.values["memory"], rel=0.15)
    assert found.peak < found.resident - found.base


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "small", "medium", "large"])
@pytest.mark.parametrize(
    ("profile", "working_set"),  # GiB that Metal recommends on the smallest Mac of the class
    [("mac-16gb", 5.33), ("mac-32gb", 21.33), ("mac-64gb", 48.0), ("mac-128gb", 96.0)],
)
def test_a_profile_made_by_hand_fits_the_macs_it_is_for(profile: str, working_set: float, preset: str) -> None:
    layers = read_profile(preset, kind="preset"), read_profile(profile)
    config = resolve(*layers, Layer("data", {"model.vocab_size": 32_000}))
    found = forecast(config.replace("test", **{"machine.micro_batch": config.unmeasured_micro_batch()}), APPLE)
    assert found.peak < 0.9 * working_set * 2**30 and not found.hazards
