"""What the self-test found is kept for a machine, and what it found broken is avoided, replaced or refused."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from siliconlm import engine
from siliconlm.config import Layer, MachineConfig, RunConfig, resolve
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen, Event, Notice
from siliconlm.files import home
from siliconlm.hardware.device import Device, open_device
from siliconlm.tuning import selftest_child, verdicts
from siliconlm.tuning.profiles import fingerprint
from siliconlm.tuning.selftest import INSTEAD, Feature, Verdict
from siliconlm.tuning.verdicts import gated, known, open_sound, remember, remembering

CPU = Device("cpu", torch.float32, 1)
T = TypeVar("T")
# A self-test's child that leaves a mark and finds one feature broken.
CHILD = """
import json, os
open(os.environ["MARKS"], "a").write("x")
for needed in ("muon", "FEATURE"):
    print(json.dumps({"name": needed, "passed": needed != "FEATURE", "error": 3.0, "limit": 1.0, "needed": needed,
                      "detail": "off by 3"}))
"""


def wrong(feature: Feature) -> Verdict:
    return Verdict(f"a check of {feature}", False, 3.0, 1.0, feature, "off by 3")


def config_of(**changes: Any) -> RunConfig:
    shape = {"model.vocab_size": 64, "machine.threads": 1}
    return resolve(Layer("test", shape | {name.replace("__", "."): value for name, value in changes.items()}))


def ended(work: Generator[Event, None, T]) -> tuple[T, list[Event]]:
    """What the work returned, and what it told."""
    told: list[Event] = []
    while True:
        try:
            told.append(next(work))
        except StopIteration as end:
            return end.value, told


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Device:
    """An Apple GPU beside the CPU, as far as opening it goes: none of it is used."""

    def opened(machine: MachineConfig) -> Device:
        if machine.device == "cpu":
            return open_device(machine)
        dtype = "bfloat16" if machine.dtype == "auto" else machine.dtype
        why = "the first" if machine.device == "auto" else "asked for"
        choices = [Chosen("machine.device", "mps", why), Chosen("machine.dtype", dtype, "usual")]
        return Device("mps", getattr(torch, dtype), 1, choices)

    monkeypatch.setattr(verdicts, "available", lambda: ["mps", "cpu"])
    monkeypatch.setattr(verdicts, "open_device", opened)
    monkeypatch.setattr("siliconlm.tuning.profiles.processor_name", lambda kind: f"chip of {kind}")
    return opened(MachineConfig())


# --- kept ------------------------------------------------------------------------------------------------------------


def test_the_test_is_run_once_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    monkeypatch.setenv("MARKS", str(marks))
    monkeypatch.setattr(selftest_child, "CHILD", (sys.executable, "-c", CHILD.replace("FEATURE", "dropout")))
    assert known(CPU) is None
    device, told = ended(verdicts.tested(CPU, MachineConfig(threads=1)))
    assert device.faults == known(CPU) == {"dropout": "dropout: off by 3"}
    assert told == [
        Notice("testing this device's arithmetic once (a few seconds)"),
        Notice("dropout is avoided: dropout: off by 3", "warning"),
    ]
    again, told = ended(verdicts.tested(CPU, MachineConfig(threads=1)))
    assert again.faults == device.faults and told == [Notice("dropout is avoided: dropout: off by 3", "warning")]
    assert marks.read_text() == "x"


def test_a_real_machine_is_sound() -> None:
    device, told = ended(verdicts.tested(CPU, MachineConfig(device="cpu", threads=1)))
    assert device.faults == known(CPU) == {}
    assert str(told[-1]).count("checks passed") == 1


def test_another_machine_or_torch_is_tested_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(CPU, [wrong("muon")])
    assert known(CPU) == {"muon": "a check of muon: off by 3"}
    monkeypatch.setattr("siliconlm.tuning.profiles.processor_name", lambda kind: "another chip")
    assert known(CPU) is None


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no TOML": lambda text: "\0" + text,
    "another machine's": lambda text: text.replace('system = "', 'system = "Other '),
    "no table of faults": lambda text: "faults = 3\n" + text.replace("[faults]", "[other]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_counts_as_none(damage: str) -> None:
    remember(CPU, [wrong("muon")])
    [path] = (home() / "selftests").iterdir()
    whole = path.read_text()
    path.write_text(DAMAGES[damage](whole))
    assert path.read_text() != whole and known(CPU) is None
    remember(CPU, [wrong("muon")])
    assert path.read_text() == whole


def test_a_self_test_that_was_not_heard_to_its_end_is_not_kept() -> None:
    heard = remembering(CPU, iter([wrong("muon"), wrong("dropout")]))
    next(heard)
    heard.close()  # type: ignore[attr-defined]
    assert known(CPU) is None
    assert len(list(remembering(CPU, iter([wrong("muon"), wrong("dropout")])))) == 2
    assert set(known(CPU) or {}) == {"muon", "dropout"}


# --- avoided ---------------------------------------------------------------------------------------------------------


def test_a_sound_device_keeps_its_choices_and_reasons(apple: Device) -> None:
    remember(apple, [Verdict("matmul", True, 0.0, 1.0, "always")])
    device, told = ended(open_sound(MachineConfig()))
    assert device == apple and device.choices[0].reason == "the first" and not told


def test_a_device_that_computes_wrongly_is_passed_over(apple: Device) -> None:
    remember(apple, [wrong("always")])
    device, told = ended(open_sound(MachineConfig(threads=1)))
    assert device.kind == "cpu"
    assert told == [Notice("device mps fails the self-test (a check of always: off by 3)", "warning")]
    [choice] = [choice for choice in device.choices if choice.setting == "machine.device"]
    assert (choice.value, choice.reason) == ("cpu", "mps fails the self-test")


def test_a_device_that_computes_wrongly_is_refused_by_name(apple: Device) -> None:
    remember(apple, [wrong("always")])
    with pytest.raises(SiliconError, match=r"mps computes wrongly here: a check of always: off by 3") as refused:
        ended(open_sound(MachineConfig(device="mps")))
    assert refused.value.kind == "wrong_results" and "--device" in refused.value.fix


def test_a_device_found_wrong_just_now_is_passed_over(
    apple: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The CPU is tested next, with the same child, and then nothing is left."""
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    monkeypatch.setattr(selftest_child, "CHILD", (sys.executable, "-c", CHILD.replace("FEATURE", "always")))
    with pytest.raises(SiliconError, match=r"cpu computes wrongly here"):
        ended(verdicts.tested(apple, MachineConfig(threads=1)))
    assert (tmp_path / "marks").read_text() == "xx"
    remember(CPU, [])
    device, _ = ended(verdicts.tested(ended(open_sound(MachineConfig(threads=1)))[0], MachineConfig(threads=1)))
    assert device.kind == "cpu"


def test_a_broken_precision_gives_way_to_float32(apple: Device) -> None:
    remember(apple, [wrong("bfloat16")])
    for device in (ended(open_sound(MachineConfig()))[0], ended(verdicts.tested(apple, MachineConfig()))[0]):
        assert device.kind == "mps" and device.dtype == torch.float32
        assert device.choices[-1] == Chosen(
            "machine.dtype", "float32", "bfloat16 fails the self-test (a check of bfloat16: off by 3)"
        )
    asked, _ = ended(open_sound(MachineConfig(dtype="bfloat16")))
    assert asked.dtype == torch.bfloat16
    with pytest.raises(SiliconError, match="bfloat16 fails the self-test") as refused:
        ended(gated(config_of(machine__dtype="bfloat16"), asked))
    assert refused.value.fix == "Use float32."


def test_a_broken_kernel_of_adamw_is_replaced() -> None:
    remember(CPU, [wrong("fused_adamw")])
    device, _ = ended(open_sound(MachineConfig(device="cpu", threads=1)))
    config, told = ended(gated(config_of(), device))
    assert config.machine.fused is False and config.sources["machine.fused"] == "self-test"
    assert fingerprint(config, device) == fingerprint(config_of(), device), "what is measured with it is found again"
    by_hand = config_of(machine__fused=False)
    assert fingerprint(by_hand, device) != fingerprint(config_of(), device)
    assert told == [
        Chosen("machine.fused", False, "the fused kernel fails the self-test (a check of fused_adamw: off by 3)")
    ]


USED: dict[Feature, dict[str, Any]] = {
    "muon": {"optim__name": "muon"},
    "grouped_queries": {"model__n_head": 4, "model__n_kv_head": 2},
    "gpt2_shape": {"model__norm": "layernorm", "model__position": "learned"},
    "averaging": {"train__ema": 0.9},
    "dropout": {"model__dropout": 0.1},
    "checkpointing": {"machine__checkpointing": True},
    "chunked_loss": {"machine__chunked_loss": True},
    "bfloat16": {"machine__dtype": "bfloat16"},
    "float16": {"machine__dtype": "float16"},
    "unfused_adamw": {"machine__fused": False},
}
WITHOUT = {"optim__name": "adamw", "model__n_head": 2, "model__n_kv_head": 2}


@pytest.mark.parametrize("feature", verdicts.USES)
def test_a_run_that_needs_what_is_broken_is_refused(feature: Feature) -> None:
    device = Device("cpu", torch.float32, 1, faults={feature: "off by 3"})
    with pytest.raises(SiliconError, match=f"{feature} fails the self-test on this device") as refused:
        ended(gated(config_of(**WITHOUT | USED[feature]), device))
    assert refused.value.fix == f"Use {INSTEAD[feature]}."
    plain = config_of(**WITHOUT)
    assert ended(gated(plain, device)) == (plain, [])


def test_a_gpu_that_cannot_decode_from_a_cache_trains_but_does_not_sample(apple: Device) -> None:
    remember(apple, [wrong("cached_decoding")])
    assert ended(open_sound(MachineConfig(threads=1)))[0].kind == "mps"
    device, told = ended(open_sound(MachineConfig(threads=1), "cached_decoding"))
    assert device.kind == "cpu" and "cached_decoding" in str(told)
    with pytest.raises(SiliconError) as refused:
        ended(open_sound(MachineConfig(device="mps"), "cached_decoding"))
    assert refused.value.fix.startswith("Sample on another device (--device)")


def test_the_self_test_by_hand_is_kept_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    monkeypatch.setattr(selftest_child, "CHILD", (sys.executable, "-c", CHILD.replace("FEATURE", "averaging")))
    told = list(engine.self_test("cpu"))
    assert [test.passed for test in told] == [True, False] and told[1].remedy == INSTEAD["averaging"]
    assert known(CPU) == {"averaging": "averaging: off by 3"}
