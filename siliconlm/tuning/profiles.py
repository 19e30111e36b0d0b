"""What was measured on this machine, kept by fingerprint: machine, versions, power source and model shape."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import tomli_w

import siliconlm
from siliconlm.config import Layer, RunConfig, flatten, read_toml
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen, Event, Probed
from siliconlm.files import home, write_file
from siliconlm.hardware.device import Device, processor_name, torch_facts
from siliconlm.hardware.facts import power

FREE = (
    "device",
    "on_battery",
    "micro_tokens",
)  # machine settings that change no measurement, or stand in a mark of their own


@dataclass(frozen=True, slots=True)
class Profile:
    """Settings measured for one model shape on one machine, with the reasons and the measurements.

    `tokens_per_s` is the sustained speed of the chosen settings, and what training is later held against.
    """

    settings: dict[str, Any]
    choices: list[Chosen]
    probes: list[Probed]
    fingerprint: dict[str, Any]
    tokens_per_s: float

    def layer(self) -> Layer:
        return Layer("profile auto", self.settings)


def machine_mark(device: Device) -> dict[str, Any]:
    """What any measurement on this machine depends on."""
    return {
        "chip": processor_name(device.kind),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "torch": torch_facts().version,
        "siliconlm": siliconlm.__version__,
        "device": device.kind,
    }


def fingerprint(config: RunConfig, device: Device) -> dict[str, Any]:
    """What a profile depends on. A change in any of these means measuring again."""
    shape = config.model.model_dump()
    untouched = (None, "self-test")  # what the self-test ruled out follows from the faults below
    by_hand = {
        name: value
        for name, value in config.machine.model_dump().items()
        if config.sources.get(f"machine.{name}") not in untouched
    }
    return machine_mark(device) | {
        "power": power(sys.platform == "darwin")[0] or "unknown",
        "threads": device.threads,
        "by_hand": json.dumps({name: value for name, value in by_hand.items() if name not in FREE}, sort_keys=True),
        "faults": sorted(device.faults),
        "tokens_per_step": config.train.tokens_per_step,
        "optimizer": config.optim.name,
        "average": config.train.ema > 0,
        "shape": f"{config.model.n_layer}x{config.model.n_embd}, context {config.model.context}",
        "model": hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16],
    }


def profile_path(mark: dict[str, Any]) -> Path:
    return home() / "profiles" / file_name(mark)


def file_name(mark: dict[str, Any]) -> str:
    """A file's name made of the chip and a digest of all that a measurement depends on."""
    digest = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:12]
    chip = re.sub(r"[^A-Za-z0-9]+", "-", str(mark["chip"])).strip("-").lower()
    return f"{chip}-{digest}.toml"


def cached(config: RunConfig, device: Device) -> tuple[Profile | None, str]:
    """The profile measured before for this machine and shape, or None; and a word when one is there but damaged."""
    mark = fingerprint(config, device)
    path = profile_path(mark)
    if not path.is_file():
        return None, ""
    try:
        profile = read_measured(path)
        if profile.fingerprint != mark:
            raise SiliconError("it is for another machine or model", where=str(path))
        config.replace("profile auto", **profile.settings)  # settings must be valid before they are believed
    except SiliconError as error:
        return None, f"the cached profile is damaged and is measured again ({error})"
    return profile, ""


def read_measured(path: Path) -> Profile:
    """A profile that was measured. SiliconError when the file is damaged, or is no measured profile."""
    tables = read_toml(path)
    try:
        about = tables["about"]
        choices, probes = [Chosen(**choice) for choice in about["choices"]], [Probed(**row) for row in about["probes"]]
        mark, rate = dict(about["fingerprint"]), float(about["tokens_per_s"])
    except (KeyError, TypeError, ValueError) as error:
        raise SiliconError(f"no measured profile: {error}", where=str(path), kind="bad_data") from None
    return Profile(flatten(tables, str(path)), choices, probes, mark, rate)


def all_profiles(here: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every profile kept; `here` is the mark of this machine, and a profile of another one is stale."""
    for path in sorted((home() / "profiles").glob("*.toml")):
        try:
            found = read_measured(path)
        except SiliconError as error:
            yield {"file": str(path), "state": f"damaged: {error.what}"}
            continue
        mark = found.fingerprint
        changed = [name for name, value in here.items() if mark.get(name) != value]
        yield {
            "file": str(path),
            "chip": mark.get("chip"),
            "device": mark.get("device"),
            "power": mark.get("power"),
            "shape": mark.get("shape"),
            "settings": found.settings,
            "tokens_per_s": found.tokens_per_s,
            "state": f"stale: another {', '.join(changed)}" if changed else "current",
        }


def store(profile: Profile) -> Path:
    """Keep a profile for later runs."""
    return export(profile, profile_path(profile.fingerprint))


def export(profile: Profile, path: Path) -> Path:
    """Write a profile as a TOML file that `--profile FILE` accepts."""
    tables: dict[str, Any] = {
        "about": {
            "fingerprint": profile.fingerprint,
            "measured": datetime.now().astimezone().replace(microsecond=0),
            "tokens_per_s": profile.tokens_per_s,
            "choices": [_plain(choice) for choice in profile.choices],
            "probes": [_plain(row) for row in profile.probes],
        }
    }
    for name, value in profile.settings.items():
        section, key = name.split(".", 1)
        tables.setdefault(section, {})[key] = value
    write_file(path, tomli_w.dumps(tables))
    return path


def _plain(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event.as_json().items() if name != "event"}
