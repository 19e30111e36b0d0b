"""What was measured on this machine, kept by fingerprint: machine, versions and model shape."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import tomli_w

import siliconlm
from siliconlm.config import Layer, RunConfig, flatten, read_toml
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen, Event, Notice, Probed
from siliconlm.files import home, write_file
from siliconlm.hardware.device import Device, bfloat16_speed, open_device, processor_name, torch_facts
from siliconlm.tuning.probe import ENOUGH, best_of, probe, probe_batches

PROFILE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Profile:
    """Settings measured for one model shape on one machine, with the reasons and the measurements."""

    settings: dict[str, Any]
    choices: list[Chosen]
    probes: list[Probed]
    fingerprint: dict[str, Any]

    def layer(self) -> Layer:
        return Layer("profile auto", self.settings)


def fingerprint(config: RunConfig, device: Device) -> dict[str, Any]:
    """What a measurement depends on. A change in any of these means measuring again."""
    shape = config.model.model_dump()
    return {
        "chip": processor_name(device.kind),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "torch": torch_facts().version,
        "siliconlm": siliconlm.__version__,
        "device": device.kind,
        "dtype": config.machine.dtype,
        "threads": device.threads,
        "checkpointing": config.machine.checkpointing,
        "compile": config.machine.compile,
        "tokens_per_step": config.train.tokens_per_step,
        "optimizer": config.optim.name,
        "model": hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16],
    }


def profile_path(mark: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:12]
    chip = re.sub(r"[^A-Za-z0-9]+", "-", str(mark["chip"])).strip("-").lower()
    return home() / "profiles" / f"{chip}-{digest}.toml"


def cached(config: RunConfig, device: Device) -> tuple[Profile | None, str]:
    """The profile measured before for this machine and shape, or None; and a word when one is there but damaged."""
    mark = fingerprint(config, device)
    path = profile_path(mark)
    if not path.is_file():
        return None, ""
    try:
        tables = read_toml(path)
        about = tables["about"]
        if about["fingerprint"] != mark:
            raise SiliconError("it is for another machine or model", where=str(path))
        choices = [Chosen(**choice) for choice in about["choices"]]
        profile = Profile(flatten(tables, str(path)), choices, [Probed(**row) for row in about["probes"]], mark)
        config.replace("profile auto", **profile.settings)  # settings must be valid before they are believed
    except (SiliconError, KeyError, TypeError) as error:
        return None, f"the cached profile is damaged and is measured again ({error})"
    return profile, ""


def store(profile: Profile) -> Path:
    """Keep a profile for later runs: a TOML file that `--profile FILE` also accepts."""
    path = profile_path(profile.fingerprint)
    tables: dict[str, Any] = {
        "about": {
            "fingerprint": profile.fingerprint,
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


def make_profile(
    config: RunConfig, device: Device, seconds: float = PROFILE_SECONDS
) -> Generator[Event, None, Profile]:
    """Measure this shape on this machine for at most about `seconds`; yields the probes and choices, returns
    the Profile.

    Micro-batch by measured speed within memory; the sequence length of the recipe unless not even one sequence fits;
    dtype by a measured comparison where the other one can win. Raises SiliconError when nothing fits.
    """
    rows: list[Probed] = []
    context, wanted = config.model.context, config.model.context
    best: Probed | None = None
    while best is None:
        if context < wanted:
            yield Notice(f"one sequence of {2 * context} tokens does not fit; trying {context}", "warning")
        shaped = config.replace("profile", **{"model.context": context})
        for row in probe_batches(shaped, device, seconds * 0.75):
            rows.append(row)
            yield row
        best = best_of(rows)
        if best is None:
            if rows[-1].verdict in ("failed", "stopped") or context <= 64:
                raise SiliconError(
                    f"not even one sequence of {context} tokens can be trained here: {rows[-1].reason}",
                    fix="Choose a smaller --preset" + ("." if device.resident else ", or --device cpu."),
                    kind="out_of_memory",
                )
            context //= 2
    choices = [_batch_choice(best, rows), _context_choice(context, wanted)]
    dtype = device.dtype_name
    if config.machine.dtype == "auto":
        chosen, compared = _compare_dtypes(shaped, device, best, seconds * 0.25)
        choices.append(chosen)
        dtype = chosen.value
        if compared:
            rows.append(compared)
            yield compared
    settings: dict[str, Any] = {"machine.micro_batch": best.micro_batch, "machine.dtype": dtype}
    if context != wanted:
        settings["model.context"] = context
    yield from choices
    return Profile(settings, choices, rows, fingerprint(config, device))


def _batch_choice(best: Probed, rows: list[Probed]) -> Chosen:
    others = [row for row in rows if row.tokens_per_s and row.micro_batch != best.micro_batch]
    reason = f"{best.tokens_per_s:,.0f} tokens/s with {best.memory / 1e9:.2f} GB"
    if others:
        second = max(others, key=lambda row: row.tokens_per_s)
        reason += f"; the smallest within 2 % of the best (next: {second.micro_batch} at {second.tokens_per_s:,.0f})"
    elif rows[-1] is not best:
        reason += f"; {rows[-1].micro_batch}: {rows[-1].reason}"
    return Chosen("machine.micro_batch", best.micro_batch, reason)


def _context_choice(context: int, wanted: int) -> Chosen:
    why = "the recipe's; it fits" if context == wanted else f"one sequence of the recipe's {wanted} does not fit"
    return Chosen("model.context", context, why)


def _compare_dtypes(config: RunConfig, device: Device, best: Probed, seconds: float) -> tuple[Chosen, Probed | None]:
    """bfloat16 against float32 by the same training step, unless a bare matmul shows that it cannot win."""
    if device.dtype_name != "float32":
        return next(choice for choice in device.choices if choice.setting == "machine.dtype"), None
    speed = bfloat16_speed(device.kind)
    if speed < 1:
        return Chosen("machine.dtype", "float32", f"a bfloat16 matmul took {1 / speed:.1f} times as long here"), None
    other = open_device(config.machine.model_copy(update={"device": device.kind, "dtype": "bfloat16"}))
    chosen = config.replace("probe", **{"machine.micro_batch": best.micro_batch, "machine.dtype": "bfloat16"})
    row = probe(chosen, replace(other, threads=device.threads), device.memory_budget(), max(seconds, 10.0))
    if row.verdict == "fits" and row.tokens_per_s * ENOUGH > best.tokens_per_s:
        why = f"{row.tokens_per_s:,.0f} tokens/s; float32: {best.tokens_per_s:,.0f}"
        return Chosen("machine.dtype", "bfloat16", why), row
    why = f"bfloat16: {row.reason or f'{row.tokens_per_s:,.0f} tokens/s'}; float32: {best.tokens_per_s:,.0f}"
    return Chosen("machine.dtype", "float32", why), row
