"""Every command end to end on the pretend Apple GPU, as processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 150  # of the run that is stopped: far more than pass between its first line and the signal
SHORT = {"model__n_layer": 1, "model__context": 32, "train__tokens_per_step": 64, "train__eval_every": 1000}


@pytest.fixture(scope="module")
def straight(mac: Any) -> Any:
    """The run `straight`, trained in one go."""
    return mac.silicon(*mac.training("straight", STEPS, **SHORT), "--device", "mps").ended()


@pytest.fixture(scope="module")
def stopped(mac: Any) -> list[dict[str, Any]]:
    """The events of the run `stopped`, which had a Ctrl-C as soon as it told of a step."""
    words = [sys.executable, "-m", "siliconlm", *mac.training("stopped", STEPS, **SHORT), "--device", "mps"]
    events: list[dict[str, Any]] = []
    told_of_a_step = False
    with subprocess.Popen(words, text=True, env=mac.environment(), stdout=subprocess.PIPE) as child:
        for line in child.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == "step" and not told_of_a_step:
                told_of_a_step = True
                child.send_signal(signal.SIGINT)
    assert child.returncode == 128 + signal.SIGINT
    return events


def test_doctor_takes_the_gpu_and_says_why(mac: Any) -> None:
    found = mac.silicon("doctor", "--json").ended().json()
    assert found["torch"]["mps_available"] and found["torch"]["mps_built"]
    assert found["torch"]["recommended_memory"] == 2 << 30
    chosen = {choice["setting"]: choice for choice in found["choices"]}
    assert chosen["machine.device"]["value"] == "mps"
    assert chosen["machine.device"]["reason"] == "the first available of cuda, mps, cpu (here: mps, cpu)"
    assert chosen["machine.dtype"]["value"] == "float32"
    assert "bfloat16" in chosen["machine.dtype"]["reason"]


def test_the_machine_is_described_where_torch_refuses_the_gpu(mac: Any) -> None:
    """A high watermark below the low one's default: torch raises at its first use of the GPU."""
    code = "from siliconlm.hardware.device import torch_facts as f; print(f().mps_available, f().recommended_memory)"
    assert mac.python("-c", code).ended().out.split() == ["True", str(2 << 30)]
    found = mac.python("-c", code, PYTORCH_MPS_HIGH_WATERMARK_RATIO="1.0").ended()
    assert found.out.split() == ["True", "None"]


def test_prepare(mac: Any) -> None:
    card = mac.silicon("prepare", str(mac.text), "--name", "again", "--tokenizer", "char", "--json").ended().json()
    assert card["event"] == "prepared" and card["name"] == "again"
    assert card["card"]["splits"]["train"]["tokens"] > 10_000


def test_probe_batch_measures_the_gpu_in_children(mac: Any) -> None:
    words = mac.training("unused", 1, train__tokens_per_step=128)
    sets = words[words.index("--set") :]
    told = (
        mac.silicon("probe-batch", "--data", "plays", "--device", "mps", "--limit", "10m", "--json", *sets)
        .ended()
        .json()
    )
    assert [row["micro_batch"] for row in told["probes"]] == [1, 2]
    assert {row["verdict"] for row in told["probes"]} <= {"fits", "slower"}
    # A process with torch in it holds far more than this: so it was the GPU's memory, not the process's.
    assert all(1e6 < row["memory"] < 50e6 and row["tokens_per_s"] > 0 for row in told["probes"])
    assert told["choices"][0]["setting"] == "machine.micro_batch"


@pytest.mark.slow
def test_profile_is_measured_once_and_names_the_chip(mac: Any) -> None:
    words = mac.training("profiled", 2, train__tokens_per_step=64)
    words[words.index("none")] = "auto"
    first = mac.silicon(*words).ended()
    words[words.index("profiled")] = "profiled-again"
    second = mac.silicon(*words).ended()
    assert first.events("probed") and not second.events("probed")
    assert [run.events("started")[0]["device"].split()[0] for run in (first, second)] == ["mps", "mps"]
    assert list((mac.home / "profiles").glob("apple-m4-*.toml"))


def test_train(mac: Any, straight: Any) -> None:
    started, (finished,) = straight.events("started")[0], straight.events("finished")
    assert started["device"] == "mps float32"
    assert {choice["setting"] for choice in started["choices"]} >= {"machine.device", "machine.dtype"}
    steps = straight.events("step")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 2
    assert finished["reason"] == "done" and finished["val_loss"] < steps[0]["loss"] - 2
    assert all(0 < event["memory"] < 50e6 for event in straight.events("progress"))


def test_resume_goes_on_as_if_nothing_had_been(mac: Any, straight: Any, stopped: list[dict[str, Any]]) -> None:
    last = stopped[-1]
    assert last["event"] == "finished" and last["reason"] == "SIGINT" and 0 < last["step"] < STEPS
    resumed = mac.silicon("resume", "stopped", "--json").ended()
    assert resumed.events("resumed")[0]["step"] == last["step"]
    both = [event for event in stopped if event["event"] == "step"] + resumed.events("step")
    assert [(step["step"], step["loss"], step["lr"]) for step in both] == [
        (step["step"], step["loss"], step["lr"]) for step in straight.events("step")
    ]
    assert resumed.events("finished")[0]["val_loss"] == straight.events("finished")[0]["val_loss"]


WAYS = [["--temperature", "0"], ["--seed", "1"], ["--seed", "1"], ["--seed", "2", "--top-p", "0.9"]]


@pytest.fixture(scope="module")
def used(mac: Any, plain: Any, straight: Any) -> list[tuple[Any, Any]]:
    """Answers of the run `straight` on the GPU and on the CPU: samples longer than the context, so that the cache is
    also refilled, and an evaluation."""
    prompts = ["sample", "Enter", "--run", "straight", "--max-tokens", "70", "--json"]
    commands = [[*prompts, *way] for way in WAYS] + [["eval", "straight", "--json"]]
    places = ((mac, "mps"), (plain, "cpu"))
    answers = [place.silicons(*([*words, "--device", device] for words in commands)) for place, device in places]
    return [(on_gpu.ended().json(), on_cpu.ended().json()) for on_gpu, on_cpu in zip(*answers, strict=True)]


def test_sample_is_the_same_text_on_gpu_and_cpu(used: list[tuple[Any, Any]]) -> None:
    texts = [[answer["samples"][0]["text"] for answer in pair] for pair in used[: len(WAYS)]]
    assert all(on_gpu == on_cpu for on_gpu, on_cpu in texts)
    greedy, seeded, again, other = (on_gpu for on_gpu, _ in texts)
    assert seeded == again and len({greedy, seeded, other}) == 3
    assert all(text.startswith("Enter") and len(text) > 40 for text, _ in texts)


def test_eval_is_the_same_on_gpu_and_cpu(used: list[tuple[Any, Any]], straight: Any) -> None:
    on_gpu, on_cpu = used[-1]
    assert on_gpu["complete"] and on_gpu["tokens"] == on_cpu["tokens"] > 1000
    assert on_gpu["val_loss"] == pytest.approx(on_cpu["val_loss"], abs=1e-4)
    assert on_gpu["val_bpb"] == pytest.approx(on_cpu["val_bpb"], abs=1e-4)
    assert on_gpu["val_loss"] == pytest.approx(straight.events("finished")[0]["val_loss"], abs=1e-4)


def test_a_model_is_taught_to_talk_there_and_answers_as_on_the_cpu(mac: Any, straight: Any, tmp_path: Path) -> None:
    """The run `straight` knows the plays' characters alone, so its lesson is of letters."""
    ask, answer = "Who goes there?", "A friend."
    lines = [{"prompt": ask, "completion": answer}] * 12
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("finetune", "straight", "--data", str(tmp_path / "talks.jsonl"), "--name", "talker", "--profile", "none")
    rates = {"train__steps": 60, "optim__lr": 0.02, "optim__matrix_lr": 0.05, "train__eval_every": 1000}
    sets = [word for name, value in rates.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]
    context = ("--set", "model.context=64")
    tuned = mac.silicon(*words, *sets, *context, "--device", "mps", "--json").ended()
    losses = [event["val_loss"] for event in tuned.events("evaluated")]
    assert losses[-1] < 0.5 * losses[0]
    talk = ("chat", "talker", "--prompt", ask, "--temperature", "0", "--json")
    gpu, cpu = (mac.silicon(*talk, "--device", device).ended().json() for device in ("mps", "cpu"))
    assert gpu["answer"] == cpu["answer"] == answer


def test_what_apple_gpus_lack_is_lacking(mac: Any, parts: dict[str, Any]) -> None:
    """Else the other tests would prove nothing."""
    assert "'aten::take' is not currently implemented for the MPS device" in parts["missing"]
    assert "doesn't support float64" in parts["float64"]
    assert "Expected all tensors to be on the same device" in parts["mixed"]


def test_a_cache_fed_in_chunks_equals_one_pass_on_the_cpu(parts: dict[str, Any]) -> None:
    assert parts["default"] == "mps"
    assert parts["chunked"] < 1e-4


def test_memory_ends_in_words_we_know_and_comes_back(parts: dict[str, Any]) -> None:
    told = parts["out_of_memory"]
    assert told["plain"] and told["recognised"]
    assert "max allowed: 2.00 GiB" in told["text"]  # not the 1.7 times as much that Metal's default allows
    assert told["after"] == 1000
    assert parts["budget"] == pytest.approx(0.9)


def test_wrong_matmuls_of_old_chips_are_refused(mac: Any) -> None:
    shapes: list[dict[str, Any]] = [
        {"model__vocab_size": 50304},
        {"train__tokens_per_step": 65_536, "machine__micro_batch": 1024},
        {"train__tokens_per_step": 1 << 20, "model__context": 1 << 20, "model__n_head": 8},
    ]
    words = [[*mac.training("wrong", 1, **shape), "--dry-run", "--device", "mps"] for shape in shapes]
    vocabulary, micro_batch, context = (run.ended(1).err for run in mac.silicons(*words, SIMMPS_CHIP="Apple M1 Pro"))
    assert "a vocabulary of 50,304 gives wrong gradients here" in vocabulary
    assert "micro-batch 1024 is too big for this device: matmuls over 32,767 or more are silently" in micro_batch
    assert "Use at most 508." in micro_batch
    assert "not even one sequence of 1,048,576 tokens can be trained on this device" in context
    later = [run.ended(code) for run, code in zip(mac.silicons(*words, SIMMPS_CHIP="Apple M3"), (0, 0, 1), strict=True)]
    assert [run.json()["started"]["device"] for run in later[:2]] == ["mps float32"] * 2
    assert "a tensor of 4 GiB can abort the process" in later[2].err  # its attention scores


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU here")
def test_without_the_gpu_nothing_else_is_taken(plain: Any) -> None:
    words = [*plain.training("nowhere", 1), "--device", "mps"]
    refused = plain.silicon(*words).ended(1)
    lines = refused.err.splitlines()
    assert lines[0].startswith("error: device mps is not available: ")
    assert lines[1:] == ["  Use --device cpu, or run silicon doctor."]
    assert refused.json()["kind"] == "no_device"
    assert not (plain.home / "runs" / "nowhere").exists()
