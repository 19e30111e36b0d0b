"""`silicon doctor` whole: facts, checks, and the device a run would take. Works where torch cannot be imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from siliconlm.config import Layer, MachineConfig, resolve
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen
from siliconlm.hardware.doctor import Check, TorchFacts, examine
from siliconlm.hardware.facts import Facts, gather


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`choices` are the device and dtype a run would take, with the reasons.

    There are none where torch is missing, or where it refuses the device for what a failed check tells.
    """

    facts: Facts
    torch: TorchFacts
    checks: list[Check]
    choices: list[Chosen]

    @property
    def healthy(self) -> bool:
        return all(check.status != "fail" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}


def diagnose(choose: Callable[[MachineConfig], list[Chosen]], wanted: str | None = None) -> Diagnosis:
    """Look at the machine. `wanted` is a device by name; SiliconError when it is not there. `choose` is asked for the
    device that a run would take, where torch can be imported."""
    facts = gather()
    try:
        from siliconlm.hardware.device import torch_facts
    except (ImportError, OSError) as error:  # torch missing, or its libraries are for another processor
        torch = TorchFacts(None, False, False, (), None, str(error))
        return Diagnosis(facts, torch, examine(facts, torch), [])
    torch = torch_facts()
    machine = resolve(Layer("--device", {"machine.device": wanted})).machine
    checks = examine(facts, torch)
    try:
        choices = choose(machine)
    except SiliconError as error:
        if error.kind == "wrong_results":  # what doctor --self-test found before, and may test again
            return Diagnosis(facts, torch, [*checks, Check("arithmetic", "fail", error.what, error.fix)], [])
        if error.kind != "bad_environment" or all(check.status != "fail" for check in checks):
            raise
        choices = []  # the failed check says the same, with more of the remedy
    return Diagnosis(facts, torch, checks, choices)
