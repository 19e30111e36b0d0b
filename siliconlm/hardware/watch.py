"""The computer while it trains: idle sleep held off; sleep, battery, lost speed, short memory and disk noticed."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

from siliconlm.events import Notice
from siliconlm.hardware.doctor import LEAST_AVAILABLE, LEAST_DISK, LITTLE_FREE_PERCENT, gib
from siliconlm.hardware.facts import (
    PowerSource,
    ask,
    disk_free,
    memory,
    parse_lowpowermode,
    parse_memory_pressure,
    parse_pmset_therm,
    parse_pressure_level,
    power,
    sysctl,
)

MAC = platform.system() == "Darwin"
# Nobody can set these. Linux's CLOCK_MONOTONIC_RAW stands still during sleep, and so does perf_counter on both.
SLEEPLESS = "CLOCK_MONOTONIC_RAW" if MAC else "CLOCK_BOOTTIME"

SLEEP_SECONDS = 5.0  # the least that is told
SLOW = 0.7  # of the usual speed
SPEED_SECONDS, FEWEST_SPEEDS = 30.0, 5  # what a sustained speed is read from, at least
READ_SECONDS, READ_SHARE = 30.0, 0.01  # between readings of the machine; the share of the time they may take
CALM_SECONDS = 60.0  # that a trouble must be gone for before it is over
POWER_SECONDS, STOP_SECONDS = 10.0, 0.2  # during a pause: between looks at the plug, and at a wish to stop

HELD = "idle sleep is held off while this trains; closing the lid still puts the computer to sleep"
NOT_HELD = "nothing here can hold off sleep: the computer may sleep while this trains"
OVER = {
    "power": "on mains power again",
    "memory": "memory is no longer short",
    "disk": "there is room on the disk again",
    "speed": "training is back to speed",
}


def sleepless() -> float:
    """Seconds by a clock that goes on while the computer sleeps: what a time budget is measured by."""
    number = getattr(time, SLEEPLESS, None)  # other systems have no such clock
    return time.monotonic() if number is None else time.clock_gettime(number)


# --- staying awake --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Awake:
    """Holds off idle sleep for the length of a `with` block, where that can be done.

    `notices` are what a laptop's user should know. However this process ends, kill -9 included, the hold ends with it.
    """

    mac: bool = MAC
    notices: list[Notice] = field(default_factory=list)
    command: list[str] | None = None
    holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Awake:
        self.command = inhibitor(self.mac)
        if power(self.mac)[1] is not None:
            self.notices = [Notice(HELD) if self.command else Notice(NOT_HELD, "warning")]
        self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """A block in which the computer may sleep."""
        self._release()
        try:
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        if self.command:
            # In a session of its own: Ctrl-C, after which there is still a checkpoint to save, must not end the hold.
            self.holder = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _release(self) -> None:
        if self.holder:
            self.holder.terminate()
            self.holder.communicate()
            self.holder = None


def inhibitor(mac: bool) -> list[str] | None:
    """A command that holds off idle sleep until this process ends, known by its id or by the end of stdin.

    None where there is none, or where it may not, as in a container. The display may go dark: to keep it on
    (`caffeinate -d`, logind's `idle`) would also keep it unlocked. Over ssh logind allows nothing but `idle`.
    """
    if mac:
        return ["caffeinate", "-i", "-w", str(os.getpid())] if shutil.which("caffeinate") else None
    for what in ("sleep", "idle"):
        command = ["systemd-inhibit", f"--what={what}", "--who=silicon", "--why=training a model", "--mode=block"]
        if ask(*command, "true") is not None:
            return [*command, "cat"]
    return None


# --- how it does ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """The machine's state as `facts.Facts` has it; None where it does not say."""

    power_source: PowerSource | None = None
    battery_percent: int | None = None
    low_power_mode: bool | None = None
    thermal: str | None = None
    memory_pressure_level: int | None = None
    memory_free_percent: int | None = None
    memory_available: int | None = None
    disk_free: int | None = None


def read(folder: Path, mac: bool = MAC) -> Reading:
    """Look at the machine, and at the disk that holds `folder`. On a Mac this asks five small commands."""
    source, percent = power(mac)
    if not mac:
        return Reading(source, percent, memory_available=memory(mac)[1], disk_free=disk_free(folder))
    return Reading(
        power_source=source,
        battery_percent=percent,
        low_power_mode=parse_lowpowermode(ask("pmset", "-g")),
        thermal=parse_pmset_therm(ask("pmset", "-g", "therm")),
        memory_pressure_level=parse_pressure_level(sysctl("kern.memorystatus_vm_pressure_level")),
        memory_free_percent=parse_memory_pressure(ask("memory_pressure", "-Q")),
        disk_free=disk_free(folder),
    )


def troubles(state: Reading, save_bytes: int) -> dict[str, str]:
    """What is wrong now, in words, by its name in `OVER`. `save_bytes` is the size of a checkpoint."""
    found = {}
    if state.power_source == "battery":
        charge = "" if state.battery_percent is None else f", {state.battery_percent} %"
        found["power"] = f"on battery{charge}: slower, and it may sleep (--on-battery pause would save and wait)"
    if is_short_of_memory(state):
        found["memory"] = "memory is short: a step that swaps is 10 to 100 times slower; close other programs"
    if state.disk_free is not None and state.disk_free < max(2 * save_bytes, LEAST_DISK):
        found["disk"] = f"only {gib(state.disk_free)} free on the disk of this run: the next checkpoints may not fit"
    return found


def is_short_of_memory(state: Reading) -> bool:
    """macOS tells its pressure; elsewhere the memory that is available does."""
    free, available = state.memory_free_percent, state.memory_available
    return (
        state.memory_pressure_level in (2, 4)
        or (free is not None and free < LITTLE_FREE_PERCENT)
        or (available is not None and available < LEAST_AVAILABLE)
    )


def slowed_by(state: Reading) -> str:
    """What the machine itself says slows it, as the end of a sentence; empty where it says nothing."""
    heat = f"heat, {state.thermal}" if state.thermal not in (None, "nominal") else ""
    saving = "low power mode is on" if state.low_power_mode else ""
    battery = "it runs on battery" if state.power_source == "battery" else ""
    reasons = "; ".join(reason for reason in (heat, saving, battery) if reason)
    return f" ({reasons})" if reasons else ""


@dataclass(slots=True)
class Watch:
    """Asked each time that losses are read, it tells what has befallen the computer: once when it begins, once when
    it is over.

    `measured` is the speed that a profile measured, in tokens/s; where it is 0 the best of this run stands for it.
    """

    on_battery: Literal["continue", "pause"]
    read: Callable[[], Reading]
    save_bytes: int = 0
    measured: float = 0.0
    sleepless: Callable[[], float] = sleepless
    awake: Callable[[], float] = time.perf_counter  # stands still during sleep
    asleep: Callable[[], AbstractContextManager[None]] = nullcontext  # a block in which the computer may sleep
    state: Reading = field(default_factory=Reading)
    seen: tuple[float, float] | None = None  # both clocks, when last looked at
    due: float = -math.inf  # when the machine is read again
    speeds: deque[tuple[float, float]] = field(default_factory=deque)
    best: float = 0.0
    told: dict[str, float] = field(default_factory=dict)  # troubles told of, and when each was last there

    def look(self, tokens_per_s: float) -> Iterator[Notice]:
        """What is new, given the training speed since the last look. Reads the machine when that is due."""
        slept, now = self._times()
        if slept > SLEEP_SECONDS:
            yield Notice(f"the computer slept for {timedelta(seconds=round(slept))}, which is time used", "warning")
        if now >= self.due:
            self.state = self.read()
            took = self.awake() - now
            self.due = now + max(READ_SECONDS, took / READ_SHARE)
        found = troubles(self.state, self.save_bytes)
        if self.on_battery == "pause":
            found.pop("power", None)  # the pause tells it
        if slow := self._slow(now, tokens_per_s):
            found["speed"] = slow
        yield from self._changes(now, found)

    @property
    def pauses(self) -> bool:
        """Whether training is to wait for mains power now."""
        return self.on_battery == "pause" and self.state.power_source == "battery"

    def wait(self, stop: Callable[[], str | None]) -> str | None:
        """Wait until there is mains power, or `stop()` gives a reason to end, which is returned.

        Meanwhile the computer may sleep, as to stay awake would empty the battery.
        """
        reason, asked = None, -math.inf
        with self.asleep():
            while self.pauses and not (reason := stop()):
                time.sleep(STOP_SECONDS)
                if (now := self.awake()) - asked >= POWER_SECONDS:
                    asked, self.state = now, self.read()
        self.seen = None
        self.speeds.clear()
        return reason

    def _times(self) -> tuple[float, float]:
        """Seconds slept since the last look, and the time by the clock that stops meanwhile."""
        sleepless, now = self.sleepless(), self.awake()
        before, self.seen = self.seen or (sleepless, now), (sleepless, now)
        return (sleepless - before[0]) - (now - before[1]), now

    def _slow(self, now: float, tokens_per_s: float) -> str:
        """Words for a speed that has been low for a while. The median: one slow moment is nothing to tell."""
        self.speeds.append((now, tokens_per_s))
        while len(self.speeds) > FEWEST_SPEEDS and now - self.speeds[1][0] >= SPEED_SECONDS:
            self.speeds.popleft()
        if len(self.speeds) < FEWEST_SPEEDS or now - self.speeds[0][0] < SPEED_SECONDS:
            return ""
        speed = statistics.median(speed for _, speed in self.speeds)
        self.best = max(self.best, speed)
        usual = self.measured or self.best
        if speed >= SLOW * usual:
            return ""
        whose = "that were measured" if self.measured else "of its best half minute"
        share = f"{100 * speed / usual:.0f} % of the {usual:,.0f} {whose}"
        return f"slow: {speed:,.0f} tokens/s, {share}{slowed_by(self.state)}"

    def _changes(self, now: float, found: dict[str, str]) -> Iterator[Notice]:
        for name, words in found.items():
            if name not in self.told:
                yield Notice(words, "warning")
            self.told[name] = now
        for name in [name for name, last in self.told.items() if now - last >= CALM_SECONDS]:
            del self.told[name]
            yield Notice(OVER[name])
