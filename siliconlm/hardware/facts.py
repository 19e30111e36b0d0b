"""What this computer is and how it does right now, without torch: chip, cores, memory, power, heat, disk.

Every outside command goes through `ask`, every output through one pure parser that answers None where it does not
understand. A fact that cannot be had is None, never a guess and never an exception.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from siliconlm.files import home

PowerSource = Literal["AC", "battery"]

ASK_SECONDS = 5.0
ENVIRONMENT = (
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "PYTORCH_MPS_LOW_WATERMARK_RATIO",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_FAST_MATH",
    "PYTORCH_MPS_PREFER_METAL",
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class Facts:
    """One reading of the machine. Memory, swap and disk in bytes; None where the machine does not say.

    `translated` is Rosetta; `thermal` is "nominal", "limited to N %" or "warning level N"; `wired_limit_mb` 0 is the
    system's default; `memory_pressure_level` is macOS's 1 (normal), 2 (warning) or 4 (critical).
    """

    system: str
    os_version: str
    machine: str
    python_version: str
    translated: bool | None
    apple_silicon: bool
    chip: str
    cores_performance: int | None
    cores_efficiency: int | None
    cores_logical: int
    cores_physical: int | None
    usable_cores: int
    memory_total: int
    memory_available: int
    swap_total: int
    swap_used: int
    gpu_name: str | None
    gpu_cores: int | None
    power_source: PowerSource | None
    battery_percent: int | None
    low_power_mode: bool | None
    thermal: str | None
    wired_limit_mb: int | None
    memory_pressure_level: int | None
    memory_free_percent: int | None
    disk_free: int | None
    home: str
    home_writable: bool
    environment: dict[str, str]


def gather() -> Facts:
    """Read the machine. Takes some milliseconds; on a Mac up to two seconds, most of it system_profiler."""
    mac = platform.system() == "Darwin"
    translated = rosetta() if mac else None
    performance, efficiency = cores_by_kind(mac)
    memory_total, memory_available = memory(mac)
    swap_total, swap_used = swap(mac)
    gpu_name, gpu_cores = gpu(mac)
    power_source, battery_percent = power(mac)
    place = home()
    return Facts(
        system=platform.system(),
        os_version=os_version(mac),
        machine=platform.machine(),
        python_version=platform.python_version(),
        translated=translated,
        apple_silicon=mac and is_apple_silicon(translated),
        chip=chip(mac),
        cores_performance=performance,
        cores_efficiency=efficiency,
        cores_logical=psutil.cpu_count() or 1,
        cores_physical=psutil.cpu_count(logical=False),
        usable_cores=usable_cores(),
        memory_total=memory_total,
        memory_available=memory_available,
        swap_total=swap_total,
        swap_used=swap_used,
        gpu_name=gpu_name,
        gpu_cores=gpu_cores,
        power_source=power_source,
        battery_percent=battery_percent,
        low_power_mode=parse_lowpowermode(ask("pmset", "-g")) if mac else None,
        thermal=parse_pmset_therm(ask("pmset", "-g", "therm")) if mac else None,
        wired_limit_mb=parse_count(sysctl("iogpu.wired_limit_mb")) if mac else None,
        memory_pressure_level=parse_pressure_level(sysctl("kern.memorystatus_vm_pressure_level")) if mac else None,
        memory_free_percent=parse_memory_pressure(ask("memory_pressure", "-Q")) if mac else None,
        disk_free=disk_free(place),
        home=str(place),
        home_writable=is_writable(place),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


def in_words(processor: str, torch: str) -> str:
    """The computer in a line, from what answers at once: `processor` (what computes), cores, memory, system, versions.

    Some sysctl calls on a Mac, some files elsewhere: milliseconds.
    """
    mac = platform.system() == "Darwin"
    own, kinds = chip(mac), cores_by_kind(mac)
    chips = own if processor == own else f"{processor} with {own}"
    cores = f"{usable_cores()} cores" + (f" ({kinds[0]}+{kinds[1]})" if kinds[0] and kinds[1] else "")
    system = ("macOS " if mac else "") + os_version(mac)
    memory_words = f"{memory(mac)[0] / 2**30:.0f} GiB"
    return f"{chips}, {cores}, {memory_words}, {system}; Python {platform.python_version()}, torch {torch}"


# --- asking ---------------------------------------------------------------------------------------------------------


def ask(*command: str) -> str | None:
    """What a command prints, or None: not there, not allowed, failed, or no answer within `ASK_SECONDS`."""
    # With SYSTEM_VERSION_COMPAT=1 in the environment sw_vers says 10.16.
    environment = {**os.environ, "LC_ALL": "C", "SYSTEM_VERSION_COMPAT": "0"}
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_SECONDS,
            env=environment,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def sysctl(key: str) -> str | None:
    """One kernel value of macOS. One key a call: a single unknown key makes the whole call fail."""
    return ask("sysctl", "-n", key)


def perflevels() -> str:
    """`key: value` lines of every performance level the chip has; two on M1 to M4, up to three on M5."""
    levels = min(parse_count(sysctl("hw.nperflevels")) or 0, 8)
    keys = [f"hw.perflevel{level}.{field}" for level in range(levels) for field in ("name", "logicalcpu")]
    return "\n".join(f"{key}: {value.strip()}" for key in keys if (value := sysctl(key)) is not None)


def cores_by_kind(mac: bool) -> tuple[int | None, int | None]:
    """Performance and efficiency cores; (None, None) where the system does not tell them apart."""
    return (parse_perflevels(perflevels()) if mac else None) or (None, None)


def gpu(mac: bool) -> tuple[str | None, int | None]:
    """Name and cores of the Mac's GPU. Elsewhere torch is the one to ask."""
    displays = ask("system_profiler", "SPDisplaysDataType", "-json") if mac else None
    return parse_displays(displays) or (None, None)


def rosetta() -> bool | None:
    """Whether this Python is an x86 program under Rosetta. Intel Macs do not know the key: None."""
    flag = parse_count(sysctl("sysctl.proc_translated"))
    return None if flag is None else flag == 1


def is_apple_silicon(translated: bool | None) -> bool:
    """Whether the Mac itself is Apple Silicon, also when this Python runs under Rosetta and says x86_64."""
    return platform.machine() == "arm64" or translated is True or parse_count(sysctl("hw.optional.arm64")) == 1


def os_version(mac: bool) -> str:
    """macOS: the product version; Linux: distribution and kernel. `platform.mac_ver` can lie in old Pythons."""
    if mac:
        return parse_sw_vers(ask("sw_vers", "-productVersion")) or platform.mac_ver()[0]
    if platform.system() != "Linux":
        return platform.version()
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = "Linux"
    return f"{name}, kernel {platform.release()}"


def chip(mac: bool) -> str:
    """The processor's name, or at least its architecture."""
    if mac:
        name = (sysctl("machdep.cpu.brand_string") or "").strip()
    elif platform.system() == "Linux":
        name = parse_cpuinfo(read(Path("/proc/cpuinfo"))) or ""
    else:
        name = platform.processor()
    return name or platform.machine()


def memory(mac: bool) -> tuple[int, int]:
    """Total and available bytes; in a container what the container may use."""
    with warnings.catch_warnings():  # psutil warns where /proc/meminfo lacks a line
        warnings.simplefilter("ignore")
        now = psutil.virtual_memory()
    total, available = int(now.total), int(now.available)
    if mac:
        return total, min(total, parse_vm_stat(ask("vm_stat")) or available)
    limits = container_memory(cgroups())
    return (min(total, limits[0]), min(available, limits[1])) if limits else (total, available)


def swap(mac: bool) -> tuple[int, int]:
    """Total and used bytes of swap."""
    if mac and (found := parse_swapusage(sysctl("vm.swapusage"))):
        return found
    with warnings.catch_warnings():  # psutil warns where /proc/vmstat is not readable
        warnings.simplefilter("ignore")
        now = psutil.swap_memory()
    return int(now.total), int(now.used)


def power(mac: bool) -> tuple[PowerSource | None, int | None]:
    """Where the power comes from and the battery's charge in percent; (None, None) where there is no telling."""
    if mac:
        return parse_pmset_batt(ask("pmset", "-g", "batt")) or (None, None)
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None or battery.power_plugged is None:
        return None, None
    return "AC" if battery.power_plugged else "battery", round(battery.percent)


def processor_share(seconds: float = 0.3) -> float:
    """The share of all cores that is busy, measured for a moment."""
    return psutil.cpu_percent(interval=seconds) / 100


def usable_cores() -> int:
    """Logical cores this process may run on: the scheduler's affinity, and the container's quota rounded up."""
    process = psutil.Process()
    # macOS has no affinity, so psutil has no such method there.
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
    quotas = [quota for group in cgroups() if (quota := parse_cpu_max(read(group / "cpu.max")))]
    return max(1, min([allowed, *quotas]))


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest folder above it that exists."""
    # os.path.exists, unlike Path.exists, answers False where a folder above may not be read.
    return next((place for place in (path, *path.parents) if os.path.exists(place)), Path(path.anchor or "."))


def disk_free(path: Path) -> int | None:
    """Bytes free for this user on the disk that holds (or would hold) `path`."""
    try:
        return shutil.disk_usage(nearest_existing(path)).free
    except OSError:
        return None


def is_writable(path: Path) -> bool:
    """Whether a file can be made in `path`, or where `path` would be made. Tried: permission bits do not tell all."""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest_existing(path), prefix=".tmp-silicon-"):
            return True
    except OSError:
        return False


def read(path: Path) -> str | None:
    """A small file's text, or None."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # ValueError: a name with a NUL in it
        return None


# --- containers -----------------------------------------------------------------------------------------------------


def cgroups(membership: str | None = None, mount: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """The control groups this process is in, innermost first, up to the root: any of them may hold a limit."""
    text = membership if membership is not None else read(Path("/proc/self/cgroup"))
    return [folder for base, path in parse_cgroup(text) for folder in upwards(mount / base, path)]


def upwards(base: Path, path: str) -> Iterator[Path]:
    """`base/a/b`, `base/a`, `base`. Inside a container the path may be the host's; then only the base exists."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:length])


def container_memory(groups: list[Path]) -> tuple[int, int] | None:
    """The smallest limit and the least room left among the groups, in bytes; None without a limit."""
    found = [reading for group in groups if (reading := group_memory(group))]
    return (min(limit for limit, _ in found), min(left for _, left in found)) if found else None


def group_memory(group: Path) -> tuple[int, int] | None:
    """Limit and room of one group. File cache that the kernel can drop counts as room, as in `docker stats`."""
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = parse_count(read(group / limit_file))
        if limit is not None:
            used = parse_count(read(group / used_file)) or 0
            cache = parse_inactive_file(read(group / "memory.stat")) or 0
            return limit, max(0, limit - max(0, used - cache))
    return None


# --- parsers: pure, None on what they do not understand -------------------------------------------------------------


def parse_count(text: str | None) -> int | None:
    """A whole number alone in the output, such as `25769803776`."""
    found = re.fullmatch(r"\s*([0-9]{1,20})\s*", text or "")
    return int(found[1]) if found else None


def parse_sw_vers(text: str | None) -> str | None:
    """The product version, out of `sw_vers` or `sw_vers -productVersion`."""
    found = re.search(r"^ProductVersion:[ \t]*([0-9]+(?:\.[0-9]+)*)\s*$", text or "", re.MULTILINE)
    found = found or re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)*)\s*", text or "")
    return found[1] if found else None


def parse_perflevels(text: str | None) -> tuple[int, int] | None:
    """Performance and efficiency cores out of `hw.perflevelN.name` and `.logicalcpu` lines.

    Chips differ in how many levels they have and in their names (Super, Performance, Efficiency), so all that is not
    called Efficiency counts as performance. Without names, level 0 is the fastest (Apple's documentation).
    """
    lines = re.findall(r"^hw\.perflevel([0-9])\.(name|logicalcpu):[ \t]*(\S.*?)[ \t]*$", text or "", re.MULTILINE)
    names = {level: value for level, field, value in lines if field == "name"}
    counts = {level: count for level, field, value in lines if field != "name" and (count := parse_count(value))}
    if not counts:
        return None
    slow = [level for level in counts if names.get(level, "Efficiency" if level != "0" else "") == "Efficiency"]
    efficiency = sum(counts[level] for level in slow)
    return sum(counts.values()) - efficiency, efficiency


def parse_cpuinfo(text: str | None) -> str | None:
    """The model name out of Linux's /proc/cpuinfo; many ARM machines give none, some a board name (`Model`)."""
    for field in ("model name", "Model"):
        if found := re.search(rf"^{field}[ \t]*:[ \t]*(\S.*?)[ \t]*$", text or "", re.MULTILINE):
            return found[1]
    return None


def parse_vm_stat(text: str | None) -> int | None:
    """Available bytes on macOS: free, inactive, speculative and purgeable pages. An estimate: these can be had back."""
    size = re.search(r"page size of ([0-9]{1,9}) bytes", text or "")
    found = re.findall(r"\b(free|inactive|speculative|purgeable):\s+([0-9]{1,15})\.", text or "")
    pages = {kind: int(count) for kind, count in found}
    if size is None or not {"free", "inactive"} <= pages.keys():
        return None
    return sum(pages.values()) * int(size[1])


def parse_swapusage(text: str | None) -> tuple[int, int] | None:
    """Total and used bytes out of `sysctl vm.swapusage`."""
    found = dict(re.findall(r"\b(total|used) = ([0-9]{1,12}(?:\.[0-9]{1,6})?[KMGT])\b", text or ""))
    if found.keys() != {"total", "used"}:
        return None
    total, used = (round(float(found[key][:-1]) * UNITS[found[key][-1]]) for key in ("total", "used"))
    return total, used


def parse_displays(text: str | None) -> tuple[str, int | None] | None:
    """Name and cores of the GPU out of `system_profiler SPDisplaysDataType -json`; Apple's own before any other.

    The cores are a string there, and missing for Intel and AMD.
    """
    try:
        report = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    entries = report.get("SPDisplaysDataType") if isinstance(report, dict) else None
    cards = [card for card in entries if isinstance(card, dict)] if isinstance(entries, list) else []
    names = {id(card): card.get("sppci_model") or card.get("_name") for card in cards}
    named = [card for card in cards if isinstance(names[id(card)], str)]
    if not named:
        return None
    best = max(named, key=lambda card: "sppci_cores" in card)
    return str(names[id(best)]), parse_count(str(best.get("sppci_cores", "")))


def parse_pmset_batt(text: str | None) -> tuple[PowerSource, int | None] | None:
    """Power source and charge out of `pmset -g batt`. A desktop Mac has no battery line; a UPS counts as a battery."""
    sources: dict[str, PowerSource] = {"AC Power": "AC", "Battery Power": "battery", "UPS Power": "battery"}
    found = re.search(r"Now drawing from '([^'\n]*)'", text or "")
    source = sources.get(found[1]) if found else None
    if source is None:
        return None
    charge = re.search(r"-InternalBattery-[^\n]*?\b([0-9]{1,3})%", text or "")
    return source, parse_percent(charge[1] if charge else None)


def parse_lowpowermode(text: str | None) -> bool | None:
    """Low power mode out of `pmset -g`. Macs with a high power mode call the key `powermode`: 1 is low, 2 is high."""
    found = re.findall(r"(?:^|\s)(?:low)?powermode[ \t]+([0-9])(?!\S)", text or "")
    return "1" in found if found else None


def parse_pmset_therm(text: str | None) -> str | None:
    """Heat out of `pmset -g therm`. On a cool Mac there are only notes; a missing speed limit is not an unknown one."""
    limits = re.findall(r"\bCPU_(?:Speed|Scheduler)_Limit\s*=\s*([0-9]{1,3})\b", text or "")
    percents = [percent for limit in limits if (percent := parse_percent(limit)) is not None]
    levels = re.findall(r"\b(?:Thermal|Performance) Warning Level\s*=\s*([0-9]{1,3})\b", text or "", re.IGNORECASE)
    if percents and min(percents) < 100:
        return f"limited to {min(percents)} %"
    if levels and (worst := max(map(int, levels))):
        return f"warning level {worst}"
    quiet = "No thermal warning level has been recorded" in (text or "")
    return "nominal" if percents or levels or quiet else None


def parse_memory_pressure(text: str | None) -> int | None:
    """Percent of memory free out of `memory_pressure -Q`."""
    found = re.search(r"memory free percentage:\s*([0-9]{1,3})%", text or "")
    return parse_percent(found[1] if found else None)


def parse_pressure_level(text: str | None) -> int | None:
    """`kern.memorystatus_vm_pressure_level`: 1, 2 or 4."""
    level = parse_count(text)
    return level if level in (1, 2, 4) else None


def parse_percent(text: str | None) -> int | None:
    """A whole number from 0 to 100."""
    number = parse_count(text)
    return number if number is not None and number <= 100 else None


def parse_cgroup(text: str | None) -> list[tuple[str, str]]:
    """Base folder and path of the memory groups out of /proc/self/cgroup: v2 has no controller names, v1 has."""
    lines = re.findall(r"^[0-9]+:([^:\n]*):(/[^\n]*)$", text or "", re.MULTILINE)
    return [
        ("memory" if controllers else "", path)
        for controllers, path in lines
        if not controllers or "memory" in controllers.split(",")
    ]


def parse_inactive_file(text: str | None) -> int | None:
    """Bytes of file cache not in use, out of memory.stat; v1 counts groups below only in `total_inactive_file`."""
    found = dict(re.findall(r"^(total_inactive_file|inactive_file) ([0-9]{1,20})$", text or "", re.MULTILINE))
    return parse_count(found.get("total_inactive_file", found.get("inactive_file")))


def parse_peak_resident(text: str | None) -> int | None:
    """Bytes of the largest resident set out of Linux's /proc/PID/status; some sandboxes leave the line out."""
    found = re.search(r"^VmHWM:[ \t]*([0-9]{1,15}) kB$", text or "", re.MULTILINE)
    return int(found[1]) << 10 if found else None


def parse_cpu_max(text: str | None) -> int | None:
    """Cores' worth of a v2 group's `quota period` in microseconds, rounded up; None for `max`."""
    found = re.fullmatch(r"\s*([0-9]{1,15})\s+([1-9][0-9]{0,14})\s*", text or "")
    return math.ceil(int(found[1]) / int(found[2])) if found else None
