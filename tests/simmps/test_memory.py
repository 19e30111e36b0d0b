"""A pretend Apple GPU with little memory: what the probe says fits, trains; what does not is told in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

# One sequence's logits are 2 MiB. 23 is prime: the probe tries 1 and all 23, whose logits alone (46 MiB) are over 0.9
# of the limit. A batch of evaluation takes eight sequences, and so more than one sequence's training.
RECOMMENDED = 50 << 20
LIMIT = {"SIMMPS_RECOMMENDED": str(RECOMMENDED)}
SEQUENCES = 23
SHAPE = {
    "model__n_layer": 1,
    "model__n_embd": 16,
    "model__head_dim": 16,
    "model__n_ff": 16,
    "model__context": 256,
    "model__vocab_size": 2048,
    "train__tokens_per_step": SEQUENCES * 256,
    "train__eval_every": 1000,
}


def settings(computer: Any) -> list[str]:
    words = computer.training("unused", 1, **SHAPE)
    return words[words.index("--set") :]


@pytest.fixture(scope="module")
def probes(mac: Any) -> dict[str, Any]:
    words = ["probe-batch", "--data", "plays", "--device", "mps", "--limit", "10m", "--json"]
    return mac.silicon(*words, *settings(mac), **LIMIT).ended().json()


def test_probe_finds_what_fits(probes: dict[str, Any]) -> None:
    fits, too_big = probes["probes"]
    assert (fits["micro_batch"], fits["verdict"]) == (1, "fits")
    assert fits["memory"] == pytest.approx(fits["predicted"], rel=0.02)
    assert (too_big["micro_batch"], too_big["verdict"]) == (SEQUENCES, "too big")
    assert too_big["predicted"] > 0.9 * RECOMMENDED and too_big["memory"] == 0, "it was not tried"
    assert too_big["reason"] == "would need 0.15 GB; the budget is 0.05 GB"
    assert [(item["setting"], item["value"]) for item in probes["choices"]] == [("machine.micro_batch", 1)]


def test_a_probe_of_what_does_not_fit_ends_at_the_limit_of_its_own(mac: Any) -> None:
    """Nine tenths of what the GPU recommends."""
    tables: dict[str, Any] = {"machine": {"device": "mps", "threads": 1, "micro_batch": SEQUENCES}}
    for name, value in SHAPE.items():
        section, key = name.split("__")
        tables.setdefault(section, {})[key] = value
    question = json.dumps({"config": tables, "fraction": 0.9, "budget": 0, "seconds": 1.0})
    # The child dies when its stdin ends, so it gets a pipe that stays open.
    command = [sys.executable, "-P", "-m", "siliconlm.tuning.child"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=mac.environment(**LIMIT)) as child:
        assert child.stdin and child.stdout
        child.stdin.write(question + "\n")
        child.stdin.flush()
        found = json.loads(child.stdout.readline())
    assert found["out_of_memory"] and found["error"].startswith("MPS backend out of memory (MPS allocated: ")
    assert "max allowed: 45.00 MiB" in found["error"]
    assert re.search(r"Tried to allocate [0-9.]+ MiB on private pool\.$", found["error"])


def test_what_fits_trains_in_the_memory_the_probe_measured(mac: Any, probes: dict[str, Any]) -> None:
    """Evaluation, of more tokens at once than a micro-batch of this size, and save included."""
    words = mac.training("fits", 5, **SHAPE, machine__micro_batch=probes["choices"][0]["value"])
    run = mac.silicon(*words, "--device", "mps", **LIMIT).ended()
    assert run.events("finished")[0]["step"] == 5
    assert run.events("saved") and run.events("evaluated")
    used = max(event["memory"] for event in run.events("progress"))
    assert used <= probes["probes"][0]["memory"] < 0.9 * RECOMMENDED


def test_training_what_does_not_fit_says_what_to_type(mac: Any) -> None:
    words = mac.training("bursts", 2, **SHAPE, machine__micro_batch=SEQUENCES)
    run = mac.silicon(*words, "--device", "mps", **LIMIT).ended(1)
    error, fix = run.err.splitlines()
    assert error.startswith("error: out of memory: MPS backend out of memory (MPS allocated: ")
    assert "machine.micro_batch" in fix
    assert "WATERMARK" not in run.err  # torch's advice to lift the limit "may cause system failure"
    last = run.out.splitlines()[-1]
    assert '"kind": "out_of_memory"' in last


def test_nothing_fits(mac: Any, plain: Any) -> None:
    """Not even the weights: the probe, sampling and evaluating all say so in words."""
    plain.silicon(*plain.training("small", 1, train__tokens_per_step=64), "--device", "cpu").ended()
    commands = [
        ["probe-batch", "--data", "plays", "--device", "mps", *settings(mac)],
        ["sample", "Enter", "--run", "small", "--device", "mps"],
        ["eval", "small", "--device", "mps"],
    ]
    told = ["not even a micro-batch of 1 trains here: would need ", *["out of memory: MPS backend out of memory"] * 2]
    for run, words in zip(mac.silicons(*commands, SIMMPS_RECOMMENDED=str(64 << 10)), told, strict=True):
        error, fix = run.ended(1).err.splitlines()[-2:]
        assert error.startswith(f"error: {words}")
        assert "smaller --preset" in fix or "another --device" in fix
