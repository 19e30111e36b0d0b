"""What the machine can do: the self-test, micro-batches, profiles, and plans for a time."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from siliconlm import config as configs
from siliconlm.config import Layer, RunConfig
from siliconlm.data.dataset import Dataset, open_dataset
from siliconlm.data.tokenizer import byte_tokenizer
from siliconlm.engine.setup import (
    Request,
    default_data,
    find_data,
    machine_of,
    measured,
    padded_vocabulary,
    resolve_request,
)
from siliconlm.errors import SiliconError
from siliconlm.events import (
    Chosen,
    Event,
    Notice,
    Tested,
)
from siliconlm.hardware.device import (
    Device,
    open_device,
)
from siliconlm.tuning import planner, profiles, selftest_child
from siliconlm.tuning.choose import FAILURES, PROFILE_SECONDS, searching, settle, untrainable
from siliconlm.tuning.search import largest
from siliconlm.tuning.selftest import INSTEAD
from siliconlm.tuning.verdicts import gated, open_sound, remembering, within

UNPROFILED_SECONDS = 600.0  # a planned run shorter than this is not worth a minute of profiling


def self_test(device: str | None = None) -> Iterator[Tested]:
    """The device's arithmetic held against the CPU's, for every operation that training and sampling use."""
    place = open_device(machine_of(device))
    for verdict in remembering(place, selftest_child.self_test(place)):
        error = verdict.error if math.isfinite(verdict.error) else None
        remedy = "" if verdict.passed else INSTEAD[verdict.needed]
        yield Tested(verdict.name, verdict.passed, error, verdict.limit, verdict.detail, remedy)


def probe_batch(request: Request, seconds: float = PROFILE_SECONDS) -> Iterator[Event]:
    """Micro-batches tried by real training steps; ends with the largest that fits."""
    config, device = yield from _shape(request)
    config = yield from gated(config, device)
    deadline = time.monotonic() + seconds
    search = yield from searching(settle(config, device), device, deadline)
    yield from search.run(largest)
    if not search.fitting and search.rows and search.rows[-1].verdict in FAILURES:
        raise untrainable(search.rows[-1], device)
    if not search.fitting:
        raise SiliconError(
            f"not even a micro-batch of 1 trains here: {search.limit}",
            fix="Choose a smaller --preset, or --set model.context=... .",
            kind="out_of_memory",
        )
    best, quickest = search.fitting[-1], max(search.fitting, key=lambda row: row.tokens_per_s)
    reason = f"the largest that fits, with {best.memory / 1e9:.2f} GB"
    if search.limit:
        reason += f"; {search.ceiling}: {search.limit}"
    yield Chosen("machine.micro_batch", best.micro_batch, reason)
    if quickest.tokens_per_s > best.tokens_per_s:
        yield Notice(f"{quickest.micro_batch} was the fastest of these; silicon profile looks for speed")


def profile(request: Request, seconds: float = PROFILE_SECONDS, refresh: bool = False) -> Iterator[Event]:
    """Measure this machine for a model shape, or show what was measured before."""
    config, device = yield from _shape(request)
    found, trouble = (None, "") if refresh else profiles.cached(config, device)
    if trouble:
        yield Notice(trouble, "warning")
    if found:
        yield Notice(f"measured before: {profiles.profile_path(found.fingerprint)} (--refresh measures again)")
        yield from found.probes
        yield from found.choices
        return
    yield from (choice for choice in device.choices if choice.setting == "machine.device")
    yield from measured(config, device, seconds)


def export_profile(request: Request, target: Path) -> Iterator[Event]:
    """Write the profile measured for a request to a file of its own, which `--profile FILE` accepts."""
    config, device = yield from _shape(request)
    if target.suffix != ".toml":
        raise SiliconError(
            f"--export {target}: the file's name must end with .toml", fix=f"Type --export {target}.toml."
        )
    if not target.parent.is_dir():
        raise SiliconError("no such folder", where=str(target.parent), fix="Make it first, or choose another one.")
    if target.exists():
        raise SiliconError("there is a file already", where=str(target), fix="Choose another name for --export.")
    found, trouble = profiles.cached(config, device)
    if found is None:
        why = trouble or "nothing is measured yet for this model on this machine"
        raise SiliconError(why, fix="Type silicon profile with the same options first.", kind="missing_input")
    yield Notice(f"written: {profiles.export(found, target)}")


def list_profiles(device: str | None = None) -> list[dict[str, Any]]:
    """A row for every measured profile, and whether it is for this machine as it is now."""
    place = open_device(machine_of(device))
    return list(profiles.all_profiles(profiles.machine_mark(place)))


def _shape(request: Request) -> Generator[Event, None, tuple[RunConfig, Device]]:
    """The config and device of a request whose data may not be prepared: then the byte vocabulary stands in."""
    if known := default_data(request):
        with open_dataset(known) as dataset:
            config = resolve_request(request, dataset)
    else:
        config = resolve_request(request, None)
        if not config.model.vocab_size:
            config = config.replace("byte tokenizer", **{"model.vocab_size": padded_vocabulary(byte_tokenizer())})
            yield Notice("nothing is prepared yet: measuring with the byte tokenizer's vocabulary")
    if config.machine.micro_batch:
        where, fix = config.sources["machine.micro_batch"], "Leave it out: it is what is measured."
        raise SiliconError(f"machine.micro_batch = {config.machine.micro_batch}", where=where, fix=fix)
    device = yield from open_sound(config.machine)
    device.check_model(config.model)
    return config, device


def plan(request: Request, refresh: bool = False) -> Iterator[Event]:
    """For each shape of the ladder what it would reach in the request's time on this machine; one is chosen."""
    if not seconds_of(resolve_request(request, None)):
        raise SiliconError("a plan needs a time", fix="Type --time 30m or --until 07:00.", kind="usage")
    with (yield from find_data(request)) as dataset:
        yield from _planned(request, dataset, refresh)


def shaped(request: Request, dataset: Dataset) -> Generator[Event, None, tuple[Request, float]]:
    """The request with a shape in it: by a plan where a time is given and nothing says which model to train in it.

    With it the tokens/s that the plan measured, 0 where there is no plan.
    """
    given = [*configs.parse_assignments(request.assignments).values]
    if request.profile not in ("auto", "none"):
        given += configs.read_profile(request.profile).values
    named = request.preset is not None or any(name.startswith("model.") for name in given)
    if named or not seconds_of(resolve_request(request, None)):
        return request, 0.0
    return (yield from _planned(request, dataset))


def _planned(
    request: Request, dataset: Dataset, refresh: bool = False
) -> Generator[Event, None, tuple[Request, float]]:
    """The request with the plan's shape in it, and the tokens/s that were measured for it."""
    asked = resolve_request(request, dataset)
    if asked.machine.micro_batch:
        fix = "Say which model with --preset, or leave the micro-batch (--profile, --set) out."
        raise SiliconError("a plan chooses the micro-batch itself", fix=fix)
    seconds = seconds_of(asked)
    device = yield from open_sound(asked.machine)
    card = dataset.card["splits"]["val"]
    task = planner.Task(seconds, dataset.train.count, card["tokens"], dataset.val_bytes_per_token)

    def configure(rung: planner.Rung, per_step: int) -> RunConfig:
        return within(resolve_request(replace(request, shape=rung.layer(per_step)), dataset), device)

    best, rung = yield from planner.plan(device, task, configure, refresh)
    values = dict(rung.layer(best.tokens_per_step).values)
    if seconds < UNPROFILED_SECONDS:
        values["machine.micro_batch"] = best.micro_batch
    speed = "measured" if best.measured else "estimated"
    yield Chosen(
        "model",
        f"{rung.name} ({best.parameters / 1e6:.2g} M parameters)",
        f"predicted val_loss {best.val_loss:.2f} after {best.tokens / 1e6:.3g} M tokens, {best.passes:.2g} passes over "
        f"the data ({best.tokens_per_s:,.0f} tokens/s {speed}); --preset overrules",
    )
    return replace(request, shape=Layer(f"plan {rung.name}", values)), best.tokens_per_s if best.measured else 0.0


def seconds_of(config: RunConfig) -> float:
    """The seconds of a time budget, or until its deadline; 0 for other budgets."""
    until = config.train.until
    return (until - datetime.now(UTC)).total_seconds() if until else config.train.time or 0.0
