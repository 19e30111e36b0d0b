"""What the self-test found on this machine: kept once per chip, system, torch and device, and what it rules out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import tomli_w

from siliconlm.config import MachineConfig, ModelConfig, RunConfig, read_toml
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen, Event, Notice
from siliconlm.files import home, write_file
from siliconlm.hardware.device import DTYPES, Device, available, open_device
from siliconlm.tuning.profiles import file_name, machine_mark
from siliconlm.tuning.selftest import INSTEAD, Feature, Verdict, gates
from siliconlm.tuning.selftest_child import self_test

# Whether a run uses a feature. What is not here is decided elsewhere: long matmuls by the device, the dtype below.
USES: dict[Feature, Callable[[RunConfig], bool]] = {
    "muon": lambda config: config.optim.name == "muon",
    "grouped_queries": lambda config: "grouped_queries" in features_of(config.model),
    "gpt2_shape": lambda config: "gpt2_shape" in features_of(config.model),
    "averaging": lambda config: config.train.ema > 0,
    "dropout": lambda config: config.model.dropout > 0,
    "checkpointing": lambda config: config.machine.checkpointing,
    "chunked_loss": lambda config: config.machine.chunked_loss,
    "bfloat16": lambda config: config.machine.dtype == "bfloat16",
    "float16": lambda config: config.machine.dtype == "float16",
    "unfused_adamw": lambda config: not config.machine.fused,
}


def features_of(model: ModelConfig) -> list[Feature]:
    """What a model's shape needs of a device, also where it is only used."""
    found: list[Feature] = ["grouped_queries"] if model.n_kv_head != model.n_head else []
    return found + (["gpt2_shape"] if model.norm == "layernorm" or model.position == "learned" else [])


def open_sound(machine: MachineConfig, *needed: Feature) -> Generator[Event, None, Device]:
    """`open_device`, with what the self-test found there, if it was run: a device or precision that nobody asked for
    by name and that computes wrongly is passed over, and that is said. SiliconError for one that was asked for.

    `needed` are features without which the device is of no use.
    """
    kinds = available() if machine.device == "auto" else [machine.device]
    for kind in kinds:
        passed_over = kind != kinds[0]
        device = open_device(machine.model_copy(update={"device": kind}) if passed_over else machine)
        device = replace(device, faults=known(device) or {})
        if passed_over:
            device = _decided(device, "machine.device", kind, f"{kinds[0]} fails the self-test")
        broken: Feature | None = next((name for name in ("always", *needed) if name in device.faults), None)
        if broken is None:
            return _sound_dtype(device, machine)
        fault = device.faults[broken]
        yield Notice(f"device {kind} fails the self-test ({fault})", "warning")
    other = INSTEAD[broken] if broken in ("always", "cached_decoding") else "use another device (--device)"
    fix = f"{other.capitalize()}; silicon doctor --self-test tests it again."
    raise SiliconError(f"{kinds[-1]} computes wrongly here: {fault}", fix=fix, kind="wrong_results")


def _sound_dtype(device: Device, machine: MachineConfig) -> Device:
    fault = device.faults.get(device.dtype_name)
    if fault is None or machine.dtype != "auto":
        return device
    reason = f"{device.dtype_name} fails the self-test ({fault})"
    return _decided(replace(device, dtype=DTYPES["float32"]), "machine.dtype", "float32", reason)


def _decided(device: Device, setting: str, value: str, reason: str) -> Device:
    """The device with another choice in place of the one it made of a setting."""
    others = [choice for choice in device.choices if choice.setting != setting]
    return replace(device, choices=[*others, Chosen(setting, value, reason)])


def within(config: RunConfig, device: Device) -> RunConfig:
    """The config, without the one feature that can be done without; SiliconError where a run needs what is broken."""
    for feature, uses in USES.items():
        if feature in device.faults and uses(config):
            raise SiliconError(
                f"{feature} fails the self-test on this device ({device.faults[feature]})",
                fix=f"Use {INSTEAD[feature]}.",
            )
    if "fused_adamw" in device.faults and config.machine.fused:
        return config.replace("self-test", **{"machine.fused": False})
    return config


def gated(config: RunConfig, device: Device) -> Generator[Event, None, RunConfig]:
    """`within`, saying what it changed."""
    changed = within(config, device)
    if changed is not config:
        reason = f"the fused kernel fails the self-test ({device.faults['fused_adamw']})"
        yield Chosen("machine.fused", False, reason)
    return changed


def tested(device: Device, machine: MachineConfig) -> Generator[Event, None, Device]:
    """The device with what the self-test finds; the test is run where it never was on this machine.

    One that proves unusable is left for another, as in `open_sound`, which is tested in turn.
    """
    faults = known(device)
    if faults is None:
        yield Notice("testing this device's arithmetic once (a few seconds)")
        verdicts = list(self_test(device))
        faults = remember(device, verdicts)
        if not faults:
            yield Notice(f"{len(verdicts)} of {len(verdicts)} checks passed")
        if "always" in faults:
            device = yield from open_sound(machine)
            return (yield from tested(device, machine))
    for feature, fault in faults.items():
        yield Notice(f"{feature} is avoided: {fault}", "warning")
    return _sound_dtype(replace(device, faults=faults), machine)


def known(device: Device) -> dict[str, str] | None:
    """Features to avoid on this device with the reason, or None where it was not tested (or the record is damaged)."""
    path, mark = _record(device)
    if not path.is_file():
        return None
    try:
        tables = read_toml(path)
    except SiliconError:
        return None  # tested again, as if it had never been
    faults = tables.get("faults")
    return faults if isinstance(faults, dict) and tables.get("machine") == mark else None


def remember(device: Device, verdicts: list[Verdict]) -> dict[str, str]:
    """Keep what a self-test found; returns the features to avoid."""
    path, mark = _record(device)
    faults = gates(verdicts)
    errors = {verdict.name: verdict.error for verdict in verdicts}
    write_file(path, tomli_w.dumps({"machine": mark, "faults": faults, "errors": errors}))
    return faults


def _record(device: Device) -> tuple[Path, dict[str, object]]:
    mark = machine_mark(device)
    return home() / "selftests" / file_name(mark), mark


def remembering(device: Device, verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    """Pass verdicts on, and keep them when all have come."""
    found: list[Verdict] = []
    for verdict in verdicts:
        found.append(verdict)
        yield verdict
    remember(device, found)
