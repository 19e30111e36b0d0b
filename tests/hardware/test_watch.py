from __future__ import annotations

import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from siliconlm.events import Notice
from siliconlm.hardware.watch import HELD, NOT_HELD, Awake, Reading, Watch, read, sleepless, troubles

AC = Reading("AC")
BATTERY = Reading("battery", 57)
LAPTOP = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=24313955)\t57%; discharging; 3:32 remaining\n"
DESKTOP = "Now drawing from 'AC Power'\n"
# What systemd-inhibit does: takes its lock, or does not, and then runs the command that follows its options.
INHIBIT = 'echo "$@" >> {log}\n{refuse}while [ "${{1#--}}" != "$1" ]; do shift; done\n{more}exec "$@"\n'


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script before all other programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
        return folder / name

    return write


def pmset(power: str) -> str:
    return f'[ "$2" = batt ] && cat <<"END"\n{power}END\nexit 0\n'


# --- staying awake ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "told"), [(LAPTOP, [Notice(HELD)]), (DESKTOP, [])], ids=["laptop", "desktop"])
def test_a_mac_is_held_by_caffeinate_without_its_display(
    program: Callable[[str, str], Path], tmp_path: Path, power: str, told: list[Notice]
) -> None:
    program("pmset", pmset(power))
    program(
        "caffeinate",
        f'echo "$@" > {tmp_path}/asked\necho $$ > {tmp_path}/id.tmp\nmv {tmp_path}/id.* {tmp_path}/id\nexec cat\n',
    )
    with Awake(mac=True) as hold:
        assert hold.notices == told
        holder = psutil.Process(int(when_there(tmp_path / "id")))
        assert holder.ppid() == os.getpid()
    assert not holder.is_running()
    assert (tmp_path / "asked").read_text().split() == ["-i", "-w", str(os.getpid())]


def when_there(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize(("refused", "what"), [("none", "sleep"), ("sleep", "idle")])
def test_linux_is_held_by_what_logind_allows(
    program: Callable[[str, str], Path], tmp_path: Path, refused: str, what: str
) -> None:
    refuse = f'[ "$1" = --what={refused} ] && exit 1\n'
    program("systemd-inhibit", INHIBIT.format(log=tmp_path / "log", refuse=refuse, more=f"touch {tmp_path}/$1\n"))
    before = psutil.Process().children()
    with Awake(mac=False):
        when_there(tmp_path / "cat")
        assert len(psutil.Process().children()) == len(before) + 1
    assert psutil.Process().children() == before
    *_, tried, held = (tmp_path / "log").read_text().splitlines()
    assert tried == f"--what={what} --who=silicon --why=training a model --mode=block true"
    assert held == tried.replace("true", "cat")


@pytest.mark.parametrize("number", ["KILL", "TERM", "INT"])
def test_the_hold_ends_with_a_process_that_is_killed(
    program: Callable[[str, str], Path], tmp_path: Path, number: str
) -> None:
    """The holder keeps one end of a pipe open for as long as it lives. Ctrl-C goes to the whole process group."""
    os.mkfifo(tmp_path / "pipe")
    more = f'[ "$1" = cat ] && exec 3> {tmp_path}/pipe\n'
    program("systemd-inhibit", INHIBIT.format(log=tmp_path / "log", refuse="", more=more))
    code = "import time\nfrom siliconlm.hardware.watch import Awake\nwith Awake(mac=False):\n    time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    with child, open(tmp_path / "pipe", "rb", buffering=0) as pipe:
        assert not select.select([pipe], [], [], 0)[0], "it is held"
        subprocess.run(["kill", f"-{number}", "--", f"-{child.pid}"], check=True)
        assert select.select([pipe], [], [], 20)[0], "the holder lives on"
        assert pipe.read() == b""


@pytest.mark.parametrize("mac", [False, True])
@pytest.mark.parametrize("refusing", [False, True])
def test_where_nothing_can_hold_training_goes_on(
    program: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, mac: bool, refusing: bool
) -> None:
    script = program("pmset", "exit 1\n")
    if refusing and not mac:
        program("systemd-inhibit", "echo 'Failed to connect to bus' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr("psutil.sensors_battery", lambda: None, raising=False)
    with Awake(mac) as hold:
        assert hold.notices == []


def test_a_laptop_that_cannot_be_held_is_told_so(
    program: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = program("pmset", f'echo "{LAPTOP}"\n')
    monkeypatch.setenv("PATH", str(script.parent))
    with Awake(mac=True) as hold:
        assert hold.notices == [Notice(NOT_HELD, "warning")]


# --- readings --------------------------------------------------------------------------------------------------------


def test_a_mac_is_read_by_its_small_commands(program: Callable[[str, str], Path], tmp_path: Path) -> None:
    program(
        "pmset",
        pmset(LAPTOP).replace("exit 0\n", "")
        + '[ "$2" = therm ] && echo "CPU_Speed_Limit = 60"\n[ $# = 1 ] && echo " lowpowermode 1"\nexit 0\n',
    )
    program("sysctl", '[ "$2" = kern.memorystatus_vm_pressure_level ] && echo 2\n')
    program("memory_pressure", 'echo "System-wide memory free percentage: 8%"\n')
    found = read(tmp_path, mac=True)
    assert found.disk_free == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.1)
    assert found == Reading("battery", 57, True, "limited to 60 %", 2, 8, None, found.disk_free)


def test_this_machine_is_read(tmp_path: Path) -> None:
    found = read(tmp_path / "not" / "there" / "yet")
    assert found.disk_free and (found.memory_available or found.memory_pressure_level)


GB = 10**9


@pytest.mark.parametrize(
    ("state", "save_bytes", "names"),
    [
        (Reading(), 0, set()),
        (AC, 0, set()),
        (BATTERY, 0, {"power"}),
        (Reading(memory_pressure_level=1, memory_free_percent=10), 0, set()),
        (Reading(memory_pressure_level=2), 0, {"memory"}),
        (Reading(memory_pressure_level=4), 0, {"memory"}),
        (Reading(memory_free_percent=9), 0, {"memory"}),
        (Reading(memory_available=GB), 0, set()),
        (Reading(memory_available=GB - 1), 0, {"memory"}),
        (Reading(disk_free=GB), GB // 2, set()),
        (Reading(disk_free=GB - 1), 0, {"disk"}),
        (Reading(disk_free=6 * GB), 3 * GB, set()),
        (Reading(disk_free=6 * GB - 1), 3 * GB, {"disk"}),
        (Reading("battery", memory_free_percent=0, disk_free=0), 0, {"power", "memory", "disk"}),
    ],
)
def test_troubles(state: Reading, save_bytes: int, names: set[str]) -> None:
    assert troubles(state, save_bytes).keys() == names


# --- watching --------------------------------------------------------------------------------------------------------


@dataclass
class Computer:
    """Time, sleep and the machine's state, all by hand; and how often it was read."""

    state: Reading = AC
    time: float = 1000.0
    asleep: float = 0.0
    reading_takes: float = 0.0
    read_at: list[float] = field(default_factory=list)

    def read(self) -> Reading:
        self.read_at.append(self.time)
        self.time += self.reading_takes
        return self.state

    def watch(self, measured: float = 0.0) -> Watch:
        def sleepless() -> float:
            return self.time + self.asleep

        return Watch("continue", self.read, measured=measured, sleepless=sleepless, awake=lambda: self.time)

    def run(self, watch: Watch, seconds: float, tokens_per_s: float = 100.0, every: float = 0.5) -> list[Notice]:
        """What is told while training goes on at one speed."""
        told: list[Notice] = []
        end = self.time + seconds
        while self.time < end:
            self.time += every
            told += watch.look(tokens_per_s)
        return told


def test_the_clock_of_budgets_goes_with_the_one_that_counts_sleep() -> None:
    before, start = sleepless(), time.perf_counter()
    time.sleep(0.05)
    assert sleepless() - before == pytest.approx(time.perf_counter() - start, abs=0.01)
    if platform.system() == "Linux":
        uptime = float(Path("/proc/uptime").read_text().split()[0])  # counts sleep: proc(5)
        assert sleepless() == pytest.approx(uptime, abs=1.0)


def test_sleep_is_told_once_with_its_length() -> None:
    computer = Computer()
    watch = computer.watch()
    computer.asleep = 500.0  # before the run
    assert computer.run(watch, 60) == []
    computer.asleep += 4000.4
    assert computer.run(watch, 60) == [Notice("the computer slept for 1:06:40, which is time used", "warning")]
    computer.asleep += 1.0
    assert computer.run(watch, 60) == []


def test_a_trouble_is_told_when_it_begins_and_when_it_is_over() -> None:
    computer = Computer()
    watch = computer.watch()
    assert computer.run(watch, 60) == []
    computer.state = BATTERY
    (begun,) = computer.run(watch, 600)
    assert begun.level == "warning" and begun.message.startswith("on battery, 57 %:")
    computer.state = AC
    assert computer.run(watch, 600) == [Notice("on mains power again")]
    computer.state = BATTERY
    assert len(computer.run(watch, 600)) == 1, "it is told anew"


def test_a_trouble_that_comes_and_goes_is_one_trouble() -> None:
    computer = Computer()
    watch = computer.watch()
    told = []
    for level in [1, 2, 1, 2, 1, 2, 1, 1, 1, 1]:
        computer.state = Reading(memory_pressure_level=level)
        told += computer.run(watch, 40)
    assert [notice.level for notice in told] == ["warning", "note"]


def test_reading_the_machine_takes_little_of_its_time() -> None:
    computer = Computer()
    computer.run(computer.watch(), 600)
    assert 600 / 30 - 1 <= len(computer.read_at) <= 600 / 30
    slow = Computer(reading_takes=5.0)
    slow.run(slow.watch(), 6000)
    assert 5.0 * len(slow.read_at) <= 0.02 * 6000


@pytest.mark.parametrize("every", [0.5, 20.0], ids=["short steps", "long steps"])
@pytest.mark.parametrize("measured", [100.0, 0.0], ids=["by a profile", "by this run"])
def test_lost_speed_is_told_when_it_lasts(measured: float, every: float) -> None:
    computer = Computer(Reading("AC", low_power_mode=True, thermal="warning level 1"))
    watch = computer.watch(measured)
    assert computer.run(watch, 300, 100.0, every) == []
    assert computer.run(watch, 300, 71.0, every) == [], "not under 70 %"
    assert computer.run(watch, every, 5.0, every) == [], "a moment"
    (slow,) = computer.run(watch, 600, 55.0, every)
    whose = "that were measured" if measured else "of its best half minute"
    why = "(heat, warning level 1; low power mode is on)"
    assert slow == Notice(f"slow: 55 tokens/s, 55 % of the 100 {whose} {why}", "warning")
    assert computer.run(watch, 600, 90.0, every) == [Notice("training is back to speed")]


def test_a_run_that_is_slow_from_its_start_is_told_by_its_profile() -> None:
    computer = Computer()
    assert computer.run(computer.watch(100.0), 25, 40.0) == [], "too early to tell"
    assert len(computer.run(computer.watch(100.0), 100, 40.0)) == 1
    assert computer.run(computer.watch(), 100, 40.0) == []
