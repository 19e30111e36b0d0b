"""Training on the pretend Apple GPU against the same training on the CPU of a process that knows no such GPU."""

from __future__ import annotations

from typing import Any

import pytest

STEPS = 8
SMALLER = {"model__n_head": 4, "model__n_kv_head": 4, "model__head_dim": 16}
GPT2 = {
    "model__norm": "layernorm",
    "model__position": "learned",
    "model__mlp": "gelu",
    "model__qk_norm": False,
    "model__bias": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "muon": {"optim__name": "muon"},
    "adamw": {"optim__name": "adamw"},
    "grouped": {**SMALLER, "model__n_kv_head": 2},
    "accumulated": {"machine__micro_batch": 2},
    "llama": {**SMALLER, "model__qk_norm": False, "model__tied": False},
    "gpt2": {**SMALLER, **GPT2},
    "chunked": {"machine__chunked_loss": True},
    "averaged": {"train__ema": 0.5, "train__grad_clip": 0},
}
SAME = {"accumulated", "recomputed", "chunked", "float16-chunked"}  # as another one, but for rounding
DROPOUT = {**SMALLER, "model__dropout": 0.1, "machine__micro_batch": 4}
GPU_ONLY: dict[str, dict[str, Any]] = {
    "dropout": DROPOUT,
    "recomputed": {**DROPOUT, "machine__checkpointing": True},
    "bfloat16": {"machine__dtype": "bfloat16"},
    "float16": {"machine__dtype": "float16"},
    "float16-chunked": {"machine__dtype": "float16", "machine__chunked_loss": True},
}


def train(computer: Any, device: str, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    commands = [
        [*computer.training(f"{name}-{device}", STEPS, train__eval_every=100, **settings), "--device", device]
        for name, settings in variants.items()
    ]
    return {name: run.ended() for name, run in zip(variants, computer.silicons(*commands), strict=True)}


@pytest.fixture(scope="module")
def on_gpu(mac: Any) -> dict[str, Any]:
    return train(mac, "mps", VARIANTS | GPU_ONLY)


@pytest.fixture(scope="module")
def on_cpu(plain: Any) -> dict[str, Any]:
    return train(plain, "cpu", VARIANTS)


def of(run: Any, what: str) -> list[float]:
    values = [step[what] for step in run.events("step")]
    assert len(values) == STEPS
    return values


def final(run: Any) -> float:
    return run.events("finished")[0]["val_loss"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_equals_the_cpus(variant: str, on_gpu: dict[str, Any], on_cpu: dict[str, Any]) -> None:
    gpu, cpu = on_gpu[variant], on_cpu[variant]
    assert [run.events("started")[0]["device"] for run in (gpu, cpu)] == ["mps float32", "cpu float32"]
    assert of(gpu, "loss") == pytest.approx(of(cpu, "loss"), abs=1e-4)
    assert of(gpu, "grad_norm") == pytest.approx(of(cpu, "grad_norm"), rel=1e-3)
    assert final(gpu) == pytest.approx(final(cpu), abs=1e-4)
    assert of(gpu, "loss")[-1] < of(gpu, "loss")[0] - 0.3  # it did train


def test_the_variants_are_different_trainings(on_gpu: dict[str, Any]) -> None:
    ends = {name: final(run) for name, run in on_gpu.items() if name not in SAME}
    assert len(set(ends.values())) == len(ends)


def test_accumulation_changes_only_rounding(on_gpu: dict[str, Any]) -> None:
    assert on_gpu["accumulated"].events("started")[0]["accumulation"] == 4
    assert on_gpu["muon"].events("started")[0]["accumulation"] == 1
    assert of(on_gpu["accumulated"], "loss") == pytest.approx(of(on_gpu["muon"], "loss"), abs=1e-4)


def test_a_chunked_loss_changes_only_rounding(on_gpu: dict[str, Any]) -> None:
    """Also where the loss is scaled: the gradients are made before the scale is known."""
    for plain, chunked, error in (("muon", "chunked", 1e-4), ("float16", "float16-chunked", 0.01)):
        assert of(on_gpu[chunked], "loss") == pytest.approx(of(on_gpu[plain], "loss"), abs=error)
        assert of(on_gpu[chunked], "grad_norm") == pytest.approx(of(on_gpu[plain], "grad_norm"), rel=max(error, 1e-3))


def test_recomputed_blocks_drop_the_same_values(on_gpu: dict[str, Any]) -> None:
    """torch.utils.checkpoint alone draws new ones there (pytorch#127676): then gradients and later losses differ."""
    kept, recomputed = on_gpu["dropout"], on_gpu["recomputed"]
    assert of(recomputed, "grad_norm") == pytest.approx(of(kept, "grad_norm"), rel=1e-5)
    assert of(recomputed, "loss") == pytest.approx(of(kept, "loss"), abs=1e-5)


def test_bfloat16_stays_near_float32(on_gpu: dict[str, Any]) -> None:
    halved, full = on_gpu["bfloat16"], on_gpu["muon"]
    assert halved.events("started")[0]["device"] == "mps bfloat16"
    assert of(halved, "loss") == pytest.approx(of(full, "loss"), abs=0.05)
    assert of(halved, "loss") != of(full, "loss")
