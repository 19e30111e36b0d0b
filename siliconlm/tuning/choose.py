"""Every setting of a machine decided by measured training steps: `make_profile`.

First the micro-batch; then, one after the other, what else may change the speed. A change is taken where it is at
least 2 % faster; each choice says what it was held against.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from siliconlm.config import RunConfig
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen, Event, Notice, Probed
from siliconlm.hardware.device import Device, can_compile, open_device, other_dtypes
from siliconlm.tuning.probe import probe
from siliconlm.tuning.profiles import Profile, fingerprint
from siliconlm.tuning.search import COMPILE_SECONDS, ENOUGH, Search, fastest, forecast_sizes

PROFILE_SECONDS = 60.0
SUSTAINED_SECONDS = 6.0  # the chosen setting is measured for so long, to see what is left when the machine is warm
RECOMPUTING = 0.75  # checkpointing does about a third more work, so a larger micro-batch must gain more than that
SMALLEST_CONTEXT = 64
SHORTEST_FORECAST = 15.0  # seconds: without it a probe goes blind, so it gets them though the time be over
NOTICEABLE = 0.1  # of the memory: smaller logits are worth a loss in chunks only where that is faster
FAILURES = {"failed": "fails here", "stopped": "takes too long here"}
SAVERS: tuple[dict[str, bool], ...] = (
    {},
    {"machine.chunked_loss": True},
    {"machine.chunked_loss": True, "machine.checkpointing": True},
)


@dataclass(slots=True)
class Tuning:
    """The best setting so far, what was tried, and why each choice was made."""

    config: RunConfig  # as asked for: what it sets by hand stays as it is
    search: Search  # of the best setting so far
    best: Probed
    rows: list[Probed]
    deadline: float
    choices: list[Chosen] = field(default_factory=list)

    def fixed(self, setting: str) -> bool:
        """Whether a setting was given by hand."""
        return setting in self.config.sources

    def choose(self, setting: str, value: object, reason: str) -> None:
        """Note a choice; an earlier one of another value no longer holds."""
        self.choices = [item for item in self.choices if item.setting != setting or item.value == value]
        self.choices.append(Chosen(setting, value, reason))

    def compare(self, setting: str, value: Any, gain: float = 1 / ENOUGH, extra: float = 0.0) -> Iterator[Event]:
        """Measure the best setting so far with one change in it; keep the change if it is `gain` times as fast."""
        config, micro = self.search.config, self.best.micro_batch
        now = getattr(config.machine, setting.removeprefix("machine."))
        if self.search.seconds_left < self.search.child_seconds(micro) + extra:
            self.choose(setting, now, f"{value} was not measured: no time left (--limit gives more)")
            return
        changed = config.replace("profile", **{setting: value, "machine.micro_batch": micro})
        device = replace(open_device(changed.machine), faults=self.search.device.faults)
        limit = self.search.patience(micro, extra)
        row = probe(changed, device, self.search.budget, limit, self.search.predicted(micro))
        self.rows.append(row)
        yield row
        if row.verdict == "fits" and row.tokens_per_s >= gain * self.best.tokens_per_s:
            yield from self._again()
        if row.verdict == "fits" and row.tokens_per_s >= gain * self.best.tokens_per_s:
            self.choose(setting, value, f"{row.tokens_per_s:,.0f} tokens/s; {now}: {self.best.tokens_per_s:,.0f}")
            self.search, self.best = Search(changed, device, self.deadline, {}, [row]), row
        else:
            told = f"{row.tokens_per_s:,.0f} tokens/s" if row.verdict == "fits" else row.reason
            self.choose(setting, now, f"{value}: {told}; {now}: {self.best.tokens_per_s:,.0f}")

    def _again(self) -> Iterator[Event]:
        """Measure the best setting once more before it is given up: it may have met a busy moment."""
        micro = self.best.micro_batch
        if self.search.seconds_left < self.search.child_seconds(micro):
            return
        config = self.search.config.replace("profile", **{"machine.micro_batch": micro})
        limit, needed = self.search.patience(micro), self.search.predicted(micro)
        row = probe(config, self.search.device, self.search.budget, limit, needed)
        self.rows.append(row)
        self.search.rows.append(row)
        yield row
        if row.verdict == "fits" and row.tokens_per_s > self.best.tokens_per_s:
            self.best = row


def make_profile(
    config: RunConfig, device: Device, seconds: float = PROFILE_SECONDS
) -> Generator[Event, None, Profile]:
    """Measure this shape on this machine for about `seconds`; yields the probes and choices, returns the Profile.

    The sequence length is the recipe's unless not even one sequence fits. A setting that the self-test found broken
    (`device.faults`) is not tried. Raises SiliconError when nothing fits.
    """
    deadline = time.monotonic() + seconds
    tuning = yield from _start(config, device, deadline)
    plain = tuning.search
    yield from _dtype(tuning, device)
    yield from _threads(tuning, device)
    yield from _loss(tuning)
    yield from _checkpointing(tuning, plain)
    yield from _compile(tuning)
    if tuning.search is not plain and tuning.search.seconds_left > tuning.search.child_seconds(tuning.best.micro_batch):
        yield from _once_more(tuning)
    sustained = yield from _sustained(tuning)
    tuning.choices.insert(0, _batch_choice(tuning))
    yield from tuning.choices
    names = ("micro_batch", "dtype", "checkpointing", "chunked_loss", "compile", "threads")
    machine = tuning.search.config.machine
    settings = {f"machine.{name}": getattr(machine, name) for name in names} | {
        "machine.micro_batch": tuning.best.micro_batch
    }
    if tuning.best.context != config.model.context:
        settings["model.context"] = tuning.best.context
    rate = (sustained or tuning.best).tokens_per_s
    return Profile(settings, tuning.choices, tuning.rows, fingerprint(config, device), rate)


def settle(config: RunConfig, device: Device) -> RunConfig:
    """The config with the device's kind, dtype and threads written into it."""
    values = {"machine.device": device.kind, "machine.dtype": device.dtype_name, "machine.threads": device.threads}
    return config.replace("device", **values)


def searching(config: RunConfig, device: Device, deadline: float) -> Generator[Event, None, Search]:
    """A search that knows what each size will need; where the forecast fails, that is said and it goes without."""
    try:
        forecast = forecast_sizes(config, device, max(SHORTEST_FORECAST, deadline - time.monotonic()))
    except SiliconError as error:
        yield Notice(f"{error}: memory is measured without a forecast", "warning")
        forecast = {}
    return Search(config, device, deadline, forecast)


def _start(config: RunConfig, device: Device, deadline: float) -> Generator[Event, None, Tuning]:
    """The fastest micro-batch that fits: of the plain step, of one that saves memory, or of shorter sequences."""
    rows: list[Probed] = []
    settled, context = settle(config, device), config.model.context
    while True:
        for changes in _savers(config, device):
            shaped = settled.replace("profile", **{"model.context": context, **changes})
            search = yield from searching(shaped, device, deadline)
            for row in search.run(fastest):
                rows.append(row)
                yield row
            best = search.best()
            if best is not None:
                tuning = Tuning(config, search, best, rows, deadline)
                _tell_context(tuning, context)
                for name in changes:
                    tuning.choose(name, True, "without it not one sequence fits")
                return tuning
            if rows[-1].verdict in FAILURES:
                break  # less memory would not help
        if rows[-1].verdict in FAILURES:
            raise untrainable(rows[-1], device)
        by_hand = _by_hand(config, "model.context")
        if by_hand or context % 2 or context // 2 < SMALLEST_CONTEXT:
            smaller = "Choose a smaller --set model.context=... or" if by_hand else "Choose a smaller"
            raise SiliconError(
                f"not even one sequence of {context} tokens can be trained here: {rows[-1].reason}",
                fix=f"{smaller} --preset" + ("." if device.resident else ", or --device cpu."),
                kind="out_of_memory",
            )
        yield Notice(f"one sequence of {context} tokens does not fit; trying {context // 2}", "warning")
        context //= 2


def untrainable(row: Probed, device: Device) -> SiliconError:
    """What to say of a first probe that failed for another reason than memory."""
    what = f"a training step of one sequence of {row.context} tokens {FAILURES[row.verdict]}"
    fix = "Type silicon doctor --self-test" + ("." if device.resident else ", or choose --device cpu.")
    return SiliconError(f"{what}: {row.reason}", fix=fix, kind="training_failed")


def _savers(config: RunConfig, device: Device) -> list[dict[str, bool]]:
    """SAVERS without what is broken here or was set otherwise by hand, each different one once."""
    found: list[dict[str, bool]] = []
    for saver in SAVERS:
        usable = {
            name: on
            for name, on in saver.items()
            if name.removeprefix("machine.") not in device.faults and name not in config.sources
        }
        if usable not in found:
            found.append(usable)
    return found


def _by_hand(config: RunConfig, setting: str) -> bool:
    """Whether a setting came from the command line, and so would lie above a profile that changes it."""
    return config.sources.get(setting, "").startswith("--")


def _tell_context(tuning: Tuning, context: int) -> None:
    wanted = tuning.config.model.context
    why = "the recipe's; it fits" if context == wanted else f"one sequence of the recipe's {wanted} does not fit"
    tuning.choose("model.context", context, why)


def _dtype(tuning: Tuning, device: Device) -> Iterator[Event]:
    if tuning.fixed("machine.dtype"):
        return
    for name, against in other_dtypes(device):
        fault = device.faults.get(name)
        if against or fault:
            own = tuning.search.config.machine.dtype
            tuning.choose("machine.dtype", own, against or f"{name} fails the self-test ({fault})")
        else:
            yield from tuning.compare("machine.dtype", name)


def _threads(tuning: Tuning, device: Device) -> Iterator[Event]:
    """On a CPU: half the threads, and half of those, as long as that helps. Small models wait more than they share."""
    if not device.resident or tuning.fixed("machine.threads"):
        return
    threads = device.threads
    while threads > 1:
        before = tuning.search
        yield from tuning.compare("machine.threads", threads // 2)
        if tuning.search is before:
            return
        threads //= 2


def _loss(tuning: Tuning) -> Iterator[Event]:
    """The loss in chunks where it is faster, or not slower and the logits take a noticeable part of the memory."""
    machine, model = tuning.search.config.machine, tuning.search.config.model
    if machine.chunked_loss or tuning.fixed("machine.chunked_loss"):
        return
    logits = tuning.best.micro_batch * model.context * model.vocab_size * 4
    fault = tuning.search.device.faults.get("chunked_loss")
    if fault:
        tuning.choose("machine.chunked_loss", False, f"it fails the self-test ({fault})")
    else:
        large = logits > NOTICEABLE * tuning.best.memory
        yield from tuning.compare("machine.chunked_loss", True, gain=ENOUGH if large else 1 / ENOUGH)


def _checkpointing(tuning: Tuning, plain: Search) -> Iterator[Event]:
    """Recomputing pays where memory, not speed, ended the search: a larger micro-batch must gain more than it costs."""
    if tuning.search.config.machine.checkpointing or tuning.fixed("machine.checkpointing"):
        return
    larger = [row.micro_batch for row in tuning.rows if row.verdict == "too big"]
    known = len(plain.fitting) > 1  # else there is no line, and only a try can tell
    expected = max((plain.speed(size) for size in larger), default=0.0) if known else math.inf
    fault = tuning.search.device.faults.get("checkpointing")
    if not larger:
        tuning.choose("machine.checkpointing", False, "the memory suffices without it")
    elif fault:
        tuning.choose("machine.checkpointing", False, f"it fails the self-test ({fault})")
    elif RECOMPUTING * expected <= tuning.best.tokens_per_s:
        why = "a larger micro-batch would gain less than recomputing costs"
        tuning.choose("machine.checkpointing", False, why)
    else:
        yield from _checkpointed(tuning)


def _checkpointed(tuning: Tuning) -> Iterator[Event]:
    config = tuning.search.config.replace("profile", **{"machine.checkpointing": True})
    search = yield from searching(config, tuning.search.device, tuning.deadline)
    for row in search.run(fastest):
        tuning.rows.append(row)
        yield row
    best, before = search.best(), tuning.best
    if best and best.tokens_per_s * ENOUGH > before.tokens_per_s:
        why = f"{best.tokens_per_s:,.0f} tokens/s; without: {before.tokens_per_s:,.0f}"
        tuning.choose("machine.checkpointing", True, why)
        tuning.search, tuning.best = search, best
    else:
        told = f"{best.tokens_per_s:,.0f} tokens/s" if best else "nothing fits"
        tuning.choose("machine.checkpointing", False, f"with it: {told}; without: {before.tokens_per_s:,.0f}")


def _compile(tuning: Tuning) -> Iterator[Event]:
    if tuning.search.config.machine.compile or tuning.fixed("machine.compile"):
        return
    if against := can_compile(tuning.search.device):
        tuning.choose("machine.compile", False, against)
    else:
        yield from tuning.compare("machine.compile", True, extra=COMPILE_SECONDS)


def _once_more(tuning: Tuning) -> Iterator[Event]:
    """Another precision or loss moves the best micro-batch: look again from the one that is known."""
    search = yield from searching(tuning.search.config, tuning.search.device, tuning.deadline)
    search.rows = [row for row in tuning.search.rows if row.verdict == "fits"]
    search.budget = tuning.search.budget  # that they were held against
    for row in search.run(fastest):
        tuning.rows.append(row)
        yield row
    tuning.search, tuning.best = search, search.best() or tuning.best


def _sustained(tuning: Tuning) -> Generator[Event, None, Probed | None]:
    """The chosen setting for longer: laptops start quick and slow down as they warm.

    One that fails twice gives way to the next smaller micro-batch.
    """
    search, failures = tuning.search, 0
    while True:
        micro = tuning.best.micro_batch
        if search.seconds_left < search.child_seconds(micro) + SUSTAINED_SECONDS:
            return None
        config = search.config.replace("profile", **{"machine.micro_batch": micro})
        limit, needed = search.patience(micro, SUSTAINED_SECONDS), search.predicted(micro)
        row = probe(config, search.device, search.budget, limit, needed, measure=SUSTAINED_SECONDS)
        row = replace(row, variant=", ".join(word for word in (row.variant, f"{SUSTAINED_SECONDS:.0f} s") if word))
        tuning.rows.append(row)
        yield row
        if row.verdict == "fits":
            told = f"sustained {row.tokens_per_s:,.0f} tokens/s over {SUSTAINED_SECONDS:.0f} s; burst {row.burst:,.0f}"
            yield Notice(told)
            return row
        failures += 1
        if failures % 2 == 0:
            smaller = [other for other in search.fitting if other.micro_batch < micro]
            if not smaller:
                raise untrainable(replace(row, verdict="failed"), search.device)
            tuning.best = smaller[-1]
            yield Notice(f"micro-batch {micro} did not hold ({row.reason}): {tuning.best.micro_batch}", "warning")


def _batch_choice(tuning: Tuning) -> Chosen:
    best = tuning.best
    others = [row for row in tuning.rows if row.verdict == "fits" and row.micro_batch != best.micro_batch]
    reason = f"{best.tokens_per_s:,.0f} tokens/s with {best.memory / 1e9:.2f} GB"
    if others:
        second = max(others, key=lambda row: row.tokens_per_s)
        reason += f"; the smallest within 2 % of the best (next: {second.micro_batch} at {second.tokens_per_s:,.0f})"
    if tuning.search.limit:
        reason += f"; {tuning.search.ceiling}: {tuning.search.limit}"
    return Chosen("machine.micro_batch", best.micro_batch, reason)
