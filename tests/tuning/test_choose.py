"""Every machine setting by measurement: what is taken, what is left, and what is said of it.

The probe's child is a machine made of a few lines here, of which the memory is known beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from siliconlm.config import Layer, RunConfig, resolve
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen, Notice, Probed
from siliconlm.hardware.device import Device
from siliconlm.tuning import choose, probe
from siliconlm.tuning.choose import make_profile
from siliconlm.tuning.profiles import Profile

# Seconds of a micro-batch: 10 ms and 10 ms a sequence, changed by the rules that a test adds.
MACHINE = """
import json, math, sys
request = json.loads(sys.stdin.readline())
config, seconds = request["config"], request["seconds"]
machine, model = config["machine"], config["model"]
micro, dtype = machine["micro_batch"], machine["dtype"]
forward, memory = 0.01 + 0.01 * micro, 10**8 + 10**6 * micro
burst = 0.9 * forward
RULES
print(json.dumps({"memory": memory, "forward_seconds": forward, "update_seconds": 0.0, "canary": 0.0,
                  "loss": math.log(model["vocab_size"]), "burst_seconds": burst}))
"""
FULL = 'print(json.dumps({"error": "full", "out_of_memory": True})); sys.exit()'
APPLE = Device("mps", torch.float32, 2)
CPU = Device("cpu", torch.float32, 2)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make the machine of these tests; it opens every device, for none of it is used."""
    monkeypatch.setenv("SILICON_HOME", str(tmp_path))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 << 30)
    monkeypatch.setattr(choose, "open_device", opened)
    monkeypatch.setattr(choose, "forecast_sizes", lambda config, device, seconds: {1: 101 * 10**6, 8: 108 * 10**6})
    for place in ("siliconlm.hardware.device", "siliconlm.tuning.profiles"):
        monkeypatch.setattr(f"{place}.processor_name", lambda kind: "Apple M4")

    def use(text: str = "") -> None:
        monkeypatch.setattr(probe, "CHILD", (sys.executable, "-c", MACHINE.replace("RULES", text)))

    use()
    return use


def opened(machine: Any) -> Device:
    return Device(machine.device, getattr(torch, machine.dtype), machine.threads)


def config_of(**changes: Any) -> RunConfig:
    shape = {"model.n_layer": 1, "model.n_embd": 16, "model.n_ff": 16, "model.vocab_size": 64, "model.context": 64}
    shape |= {"train.tokens_per_step": 64 * 8}
    by_hand = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve(Layer("preset", shape), Layer("--set", by_hand))


def made(config: RunConfig, device: Device, seconds: float = 300.0) -> tuple[Profile, list[Any]]:
    events: list[Any] = []
    work: Iterator[Any] = make_profile(config, device, seconds)
    while True:
        try:
            events.append(next(work))
        except StopIteration as end:
            return end.value, events


def chosen(profile: Profile, setting: str) -> Chosen:
    return [choice for choice in profile.choices if choice.setting == f"machine.{setting}"][-1]


def test_the_plain_step_is_kept_where_nothing_is_faster(rules: Any) -> None:
    profile, events = made(config_of(), APPLE)
    assert profile.settings == {
        "machine.micro_batch": 8,
        "machine.dtype": "float32",
        "machine.checkpointing": False,
        "machine.chunked_loss": False,
        "machine.compile": False,
        "machine.threads": 2,
    }
    batch = chosen(profile, "micro_batch")
    assert batch.value == 8 and "(next: 4 at 5,120)" in batch.reason, "the runner-up is named with its figure"
    assert chosen(profile, "dtype").reason == "float16: 5,689 tokens/s; float32: 5,689"
    assert [event for event in events if isinstance(event, Chosen)] == profile.choices
    rows = [event for event in events if isinstance(event, Probed)]
    assert rows == profile.probes and all(row.predicted > 0 for row in rows)


def test_sustained_speed_is_what_counts_later(rules: Any) -> None:
    rules("forward *= 2 if seconds > 2 else 1; burst = forward / 2")
    profile, events = made(config_of(), APPLE)
    assert profile.probes[-1].variant == "6 s"
    assert profile.tokens_per_s == profile.probes[-1].tokens_per_s == pytest.approx(512 / 0.18, rel=1e-3)
    assert any(
        isinstance(event, Notice) and event.message == "sustained 2,844 tokens/s over 6 s; burst 5,689"
        for event in events
    )


def test_a_setting_that_does_not_hold_gives_way_to_a_smaller_one(rules: Any) -> None:
    """The micro-batch of 8 takes the short measurement and not the long one, twice."""
    rules("if seconds > 2 and micro == 8: raise SystemExit('too hot')")
    profile, events = made(config_of(machine__dtype="float32"), APPLE)
    assert profile.settings["machine.micro_batch"] == 4 and chosen(profile, "micro_batch").value == 4
    warned = [event.message for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert len(warned) == 1 and warned[0].startswith("micro-batch 8 did not hold (") and "too hot" in warned[0]
    rules("if seconds > 2: raise SystemExit('too hot')")
    with pytest.raises(SiliconError, match="too hot") as raised:
        made(config_of(machine__dtype="float32"), APPLE)
    assert raised.value.kind == "training_failed"


@pytest.mark.parametrize(("share", "value"), [(0.9, "bfloat16"), (0.99, "float32"), (1.5, "float32")])
def test_another_precision_must_be_two_percent_faster(rules: Any, share: float, value: str) -> None:
    rules(f"forward *= {share} if dtype == 'bfloat16' else 1")
    profile, _ = made(config_of(), APPLE)
    assert profile.settings["machine.dtype"] == value


def test_threads_are_halved_as_long_as_that_helps(rules: Any) -> None:
    rules("forward *= {8: 4, 4: 2, 2: 1, 1: 1.5}[machine['threads']]")
    profile, _ = made(config_of(machine__dtype="float32"), Device("cpu", torch.float32, 8))
    assert profile.settings["machine.threads"] == 2
    assert "2 threads" not in chosen(profile, "threads").reason
    assert chosen(profile, "threads").reason.startswith("1: ")


def test_a_loss_in_chunks_is_taken_where_it_costs_nothing(rules: Any) -> None:
    big = {"model__vocab_size": 20_000, "machine__dtype": "float32"}
    assert made(config_of(**big), APPLE)[0].settings["machine.chunked_loss"] is True
    rules("forward *= 1.1 if machine['chunked_loss'] else 1")
    assert made(config_of(**big), APPLE)[0].settings["machine.chunked_loss"] is False


def test_checkpointing_is_for_memory_that_ends_too_soon(rules: Any) -> None:
    """A long start to every micro-batch: eight at once would be three times as fast, and only recomputing fits them."""
    rules(f"forward += 0.5\nif micro > 1 and not machine['checkpointing']: {FULL}\n")
    profile, _ = made(config_of(machine__dtype="float32"), APPLE)
    assert profile.settings["machine.checkpointing"] is True and profile.settings["machine.micro_batch"] == 8


def test_a_step_that_fits_only_with_less_memory_is_found(rules: Any) -> None:
    rules(f"if not machine['chunked_loss']: {FULL}")
    profile, _ = made(config_of(machine__dtype="float32"), APPLE)
    assert profile.settings["machine.chunked_loss"] is True
    assert chosen(profile, "chunked_loss").reason == "without it not one sequence fits"
    rules(f"if not machine['checkpointing']: {FULL}")
    assert made(config_of(machine__dtype="float32"), APPLE)[0].settings["machine.checkpointing"] is True


def test_the_context_is_halved_only_where_not_one_sequence_fits(rules: Any) -> None:
    rules(f"if model['context'] > 64: {FULL}")
    longer = config_of(machine__dtype="float32").replace("preset", **{"model.context": 128})
    profile, events = made(longer, APPLE)
    assert profile.settings["model.context"] == 64
    assert any("one sequence of 128 tokens does not fit; trying 64" in str(event) for event in events)
    rules(FULL)
    with pytest.raises(SiliconError, match="not even one sequence of 64 tokens can be trained here: full"):
        made(config_of(), APPLE)


def test_a_context_given_by_hand_is_not_halved(rules: Any) -> None:
    """It would lie above the profile, whose micro-batch then is for sequences of another length."""
    rules(f"if model['context'] > 64: {FULL}")
    with pytest.raises(SiliconError, match="not even one sequence of 128 tokens can be trained here: full"):
        made(config_of(model__context=128), APPLE)


def test_memory_is_not_saved_in_a_way_ruled_out_by_hand(rules: Any) -> None:
    rules(f"if not machine['checkpointing']: {FULL}")
    by_hand = {"machine__chunked_loss": False, "machine__dtype": "float32"}
    profile, _ = made(config_of(**by_hand), APPLE)
    assert profile.settings["machine.chunked_loss"] is False and profile.settings["machine.checkpointing"] is True
    with pytest.raises(SiliconError, match="not even one sequence of 64 tokens"):
        made(config_of(**by_hand, machine__checkpointing=False), APPLE)


def test_a_sequence_too_long_for_the_device_is_halved_without_a_try(rules: Any) -> None:
    """A block's scores of 128 heads and 32,768 tokens take 4 GiB, which no driver is asked for."""
    shape = {"model.context": 32_768, "model.n_head": 128, "model.n_kv_head": 1, "train.tokens_per_step": 32_768}
    longer = config_of(machine__dtype="float32").replace("preset", **shape)
    profile, events = made(longer, APPLE)
    assert profile.settings["model.context"] == 16_384
    first = next(event for event in events if isinstance(event, Probed))
    assert (first.micro_batch, first.verdict, first.memory) == (1, "too big", 0) and "4 GiB" in first.reason


def test_what_fails_the_self_test_is_not_tried(rules: Any) -> None:
    faults = dict.fromkeys(("bfloat16", "float16", "chunked_loss", "checkpointing"), "off by 3")
    profile, _ = made(config_of(model__vocab_size=20_000), replace(APPLE, faults=faults))
    assert {row.dtype for row in profile.probes} == {"float32"}
    assert {row.variant for row in profile.probes} == {"", "6 s"}
    assert chosen(profile, "dtype").reason == "float16 fails the self-test (off by 3)"
    assert chosen(profile, "chunked_loss").reason == "it fails the self-test (off by 3)"


def test_what_is_set_by_hand_stays(rules: Any) -> None:
    rules("forward *= 0.5 if dtype == 'bfloat16' or machine['compile'] else 1")
    by_hand = {"machine__dtype": "float32", "machine__compile": False, "machine__threads": 2}
    profile, _ = made(config_of(**by_hand), CPU)
    settings = profile.settings
    assert (settings["machine.dtype"], settings["machine.compile"], settings["machine.threads"]) == (
        "float32",
        False,
        2,
    )
    assert {row.dtype for row in profile.probes} == {"float32"}


def test_little_time_still_gives_an_answer(rules: Any) -> None:
    profile, _ = made(config_of(), APPLE, seconds=0.1)
    assert profile.settings["machine.micro_batch"] == 1
    assert "no time left" in chosen(profile, "dtype").reason
    assert profile.tokens_per_s > 0
