"""Is this computer ready to train? A list of checks, each with what to do about it. Pure: plain values in and out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from siliconlm.hardware.facts import Facts

Status = Literal["pass", "warn", "fail"]

OLDEST_PYTHON = (3, 11)
OLDEST_MACOS = 14
MATMUL_FIXED = (2, 14)
MATMUL_CAP = 32_512
"""Largest vocabulary, and most tokens in a micro-batch, on M1 and M2: below 32,767 and a multiple of 256."""

HIGH, LOW = "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "PYTORCH_MPS_LOW_WATERMARK_RATIO"
HIGH_DEFAULT, LOW_DEFAULT, WATERMARK_MOST = 1.7, 1.4, 2.0

GB = 1e9
LEAST_MEMORY, LEAST_AVAILABLE = 8 * GB, 1 * GB
LEAST_DISK, LITTLE_DISK = 1 * GB, 5 * GB
MUCH_SWAP, MUCH_SWAP_SHARE = 1 * GB, 0.25
LITTLE_FREE_PERCENT = 10


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fail` means that training cannot start; `remedy` says what to type or to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What torch says of itself. `version` None means that it cannot be imported, for the reason in `import_error`.

    `recommended_memory` is Metal's recommendedMaxWorkingSetSize in bytes.
    """

    version: str | None
    mps_built: bool
    mps_available: bool
    cuda_devices: tuple[str, ...]
    recommended_memory: int | None
    import_error: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """All that a check may look at."""

    facts: Facts
    torch: TorchFacts
    min_torch: tuple[int, int]

    @property
    def mac(self) -> bool:
        return self.facts.system == "Darwin"

    @property
    def native(self) -> bool:
        """Apple Silicon with a Python made for it: only there can torch use the GPU."""
        return self.mac and self.facts.apple_silicon and self.facts.machine == "arm64" and not self.facts.translated


def examine(facts: Facts, torch: TorchFacts, min_torch: tuple[int, int] = (2, 13)) -> list[Check]:
    """Every check that applies to this system, in the order in which one would repair them."""
    case = Case(facts, torch, min_torch)
    return [found for check in CHECKS if (found := check(case)) is not None]


def matmul_is_capped(chip: str, torch_version: str) -> bool:
    """Whether matrix products over 32,767 terms or more come out wrong here (pytorch#177116, fixed by #183535)."""
    return re.match(r"Apple M[12]\b", chip) is not None and pair(torch_version) < MATMUL_FIXED


# --- software -------------------------------------------------------------------------------------------------------


def python_architecture(case: Case) -> Check | None:
    if not case.mac:
        return None
    name, machine = "Python architecture", case.facts.machine
    if not case.facts.apple_silicon:
        detail = f"This is an Intel Mac ({case.facts.chip}); torch 2.2.2 was the last with wheels for one."
        return Check(name, "fail", detail, "Use a Mac with Apple Silicon, or Linux.")
    if case.native:
        return Check(name, "pass", f"{machine}, native")
    remedy = (
        "uv python install cpython-3.12-macos-aarch64, then make the environment anew with that Python. "
        "A universal Python needs a Terminal without `Open using Rosetta` (Finder > Get Info)."
    )
    return Check(name, "fail", f"{machine} Python under Rosetta on Apple Silicon; torch has no wheels for it.", remedy)


def python_version(case: Case) -> Check:
    version = case.facts.python_version
    if pair(version) >= OLDEST_PYTHON:
        return Check("Python", "pass", version)
    return Check("Python", "fail", f"{version}; {dotted(OLDEST_PYTHON)} or later is needed.", "uv python install 3.12")


def macos_version(case: Case) -> Check | None:
    if not case.mac:
        return None
    version = case.facts.os_version
    major = re.match(r"[0-9]{1,4}", version)
    if major is None:
        return Check("macOS", "warn", "The version is not known.", f"sw_vers must say {OLDEST_MACOS} or later.")
    if int(major[0]) >= OLDEST_MACOS:
        return Check("macOS", "pass", version)
    detail = f"{version}; torch and its GPU support (MPS) need {OLDEST_MACOS} or later."
    return Check("macOS", "fail", detail, "System Settings > General > Software Update")


def torch_version(case: Case) -> Check:
    version, least = case.torch.version, dotted(case.min_torch)
    if version is not None and pair(version) >= case.min_torch:
        return Check("torch", "pass", version)
    detail = f"{version}; {least} or later is needed."
    if version is None:
        detail = f"It cannot be imported: {case.torch.import_error or 'no reason given'}"
    possible = case.native or not case.mac
    remedy = f'pip install --upgrade "torch>={least}"' if possible else "First see to Python architecture, above."
    return Check("torch", "fail", detail, remedy)


# --- accelerator ----------------------------------------------------------------------------------------------------


def mps_build(case: Case) -> Check | None:
    if not case.native or case.torch.version is None:
        return None
    if case.torch.mps_built:
        return Check("MPS build", "pass", "This torch has GPU support for Apple Silicon.")
    detail = f"torch {case.torch.version} was built without MPS: training would run on the processor, far slower."
    remedy = f'pip install --force-reinstall "torch>={dotted(case.min_torch)}" (from PyPI, not from conda)'
    return Check("MPS build", "warn", detail, remedy)


def mps_device(case: Case) -> Check | None:
    """torch gives one text for an old macOS and for a missing Metal device (pytorch#177819), so it is not repeated."""
    if not case.native or case.torch.version is None or not case.torch.mps_built:
        return None
    if case.torch.mps_available:
        return Check("MPS device", "pass", gpu_detail(case))
    on = f"macOS {case.facts.os_version}"
    detail = f"Built into torch: yes. Available: no, on {on}. Training would use the processor."
    remedy = (
        "system_profiler SPDisplaysDataType should name a GPU with Metal. Where it does not, this is a virtual machine "
        "or a sandbox; where it does, run from a Terminal of the logged-in user, and restart the Mac."
    )
    return Check("MPS device", "warn", detail, remedy)


def gpu_detail(case: Case) -> str:
    facts, most = case.facts, case.torch.recommended_memory
    parts = [facts.gpu_name or facts.chip]
    if facts.gpu_cores is not None:
        parts.append(f"{facts.gpu_cores} cores")
    if most is not None:
        parts.append(f"{gib(most)} recommended at most")
    if facts.wired_limit_mb:
        parts.append(f"iogpu.wired_limit_mb set to {facts.wired_limit_mb}")
    return ", ".join(parts)


def cuda_device(case: Case) -> Check | None:
    if case.mac or case.torch.version is None:
        return None
    if case.torch.cuda_devices:
        return Check("GPU", "pass", ", ".join(case.torch.cuda_devices))
    detail = "None that this torch can use: training runs on the processor. Small models train, slowly."
    remedy = "With an NVIDIA GPU: see that nvidia-smi lists it, and install a CUDA build of torch (pytorch.org)."
    return Check("GPU", "warn", detail, remedy)


def matmul(case: Case) -> Check | None:
    """The fix of 2.14 is for two-dimensional products; batched ones stay wrong (pytorch#195163)."""
    chip, version = case.facts.chip, case.torch.version
    if not case.mac or version is None or not re.match(r"Apple M[12]\b", chip):
        return None
    if not matmul_is_capped(chip, version):
        return Check("Matrix products", "pass", f"torch {version} has the fix for {chip} (pytorch#183535).")
    detail = (
        f"On {chip}, torch {version} gets matrix products over 32,767 terms or more silently wrong (pytorch#177116). "
        f"Vocabulary and tokens per micro-batch are capped at {MATMUL_CAP:,}."
    )
    return Check("Matrix products", "warn", detail, f'pip install --upgrade "torch>={dotted(MATMUL_FIXED)}"')


def watermarks(case: Case) -> Check | None:
    """torch's own rule (MPSAllocator.mm): 0 <= high <= 2 and 0 <= low <= high, high 0 being no limit; else it raises.

    It sets high first and then low to 1.4, so a high mark below 1.4 alone is refused.
    """
    if not case.native:
        return None
    name, given = "MPS memory limit", case.facts.environment
    if HIGH not in given and LOW not in given:
        return Check(name, "pass", "torch's default")
    high, low = ratio(given.get(HIGH), HIGH_DEFAULT), ratio(given.get(LOW), LOW_DEFAULT)
    said = ", ".join(f"{key}={given[key]}" for key in (HIGH, LOW) if key in given)
    if not (0 <= high <= WATERMARK_MOST and 0 <= low <= (high or WATERMARK_MOST)):
        detail = f"{said}: torch refuses the GPU. High must be 0 to 2, and low ({low:g} here) not above it."
        return Check(name, "fail", detail, f"unset {HIGH} {LOW} (or set both)")
    if high == 0:
        return Check(name, "warn", f"{said}: no limit; running out of memory can freeze the Mac.", f"unset {HIGH}")
    return Check(name, "pass", said)


def fallback(case: Case) -> Check | None:
    if not case.native:
        return None
    value = case.facts.environment.get("PYTORCH_ENABLE_MPS_FALLBACK")
    if value is None or value.strip() == "0":
        return Check("MPS fallback", "pass", "off")
    detail = f"PYTORCH_ENABLE_MPS_FALLBACK={value}: operations that MPS lacks are copied to the processor, slowly."
    return Check("MPS fallback", "warn", detail, "unset PYTORCH_ENABLE_MPS_FALLBACK")


# --- the computer's state -------------------------------------------------------------------------------------------


def memory(case: Case) -> Check:
    total, available = case.facts.memory_total, case.facts.memory_available
    detail = f"{gib(total)}, {gib(available)} available"
    if total < LEAST_MEMORY:
        return Check("Memory", "warn", f"{detail}; only small models fit.", "Choose a small model and a short context.")
    if available < LEAST_AVAILABLE:
        return Check("Memory", "warn", f"{detail}.", "Close other programs, the browser first.")
    return Check("Memory", "pass", detail)


def memory_pressure(case: Case) -> Check | None:
    level, free = case.facts.memory_pressure_level, case.facts.memory_free_percent
    if level is None and free is None:
        return None
    word = {1: "normal", 2: "warning", 4: "critical"}.get(level or 0, "not known")
    detail = word if free is None else f"{word}, {free} % free"
    if level in (2, 4) or (free is not None and free < LITTLE_FREE_PERCENT):
        return Check("Memory pressure", "warn", f"{detail}: macOS compresses and swaps.", "Close other programs.")
    return Check("Memory pressure", "pass", detail)


def swap(case: Case) -> Check:
    used, total = case.facts.swap_used, case.facts.memory_total
    detail = f"{gib(used)} of {gib(case.facts.swap_total)} in use"
    if used > MUCH_SWAP or used > MUCH_SWAP_SHARE * total:
        remedy = "Close other programs; a restart empties it."
        return Check("Swap", "warn", f"{detail}; a step that swaps is 10 to 100 times slower.", remedy)
    return Check("Swap", "pass", detail)


def power(case: Case) -> Check | None:
    if case.facts.power_source is None:
        return None
    if case.facts.power_source == "AC":
        return Check("Power", "pass", "AC")
    percent = case.facts.battery_percent
    detail = "On battery" + (f", {percent} %" if percent is not None else "") + ": slower, and it may sleep."
    return Check("Power", "warn", detail, "Plug in the charger.")


def low_power_mode(case: Case) -> Check | None:
    if case.facts.low_power_mode is None:
        return None
    if not case.facts.low_power_mode:
        return Check("Low power mode", "pass", "off")
    remedy = "sudo pmset -a lowpowermode 0 (or System Settings > Battery > Low Power Mode: Never)"
    return Check("Low power mode", "warn", "On: the GPU runs at a lower clock.", remedy)


def thermal(case: Case) -> Check | None:
    state = case.facts.thermal
    if state is None:
        return None
    if state == "nominal":
        return Check("Heat", "pass", state)
    detail = f"{state}: the Mac slows itself down."
    return Check("Heat", "warn", detail, "Let it cool: free the air vents, stop other work, then `pmset -g therm`.")


def disk(case: Case) -> Check | None:
    free = case.facts.disk_free
    if free is None:
        return None
    detail = f"{gib(free)} free for {case.facts.home}"
    remedy = "Free some space, or export SILICON_HOME=/a/folder/on/another/disk"
    if free < LEAST_DISK:
        return Check("Disk", "fail", f"{detail}; a checkpoint may not fit.", remedy)
    if free < LITTLE_DISK:
        return Check("Disk", "warn", f"{detail}; a few checkpoints fill it.", remedy)
    return Check("Disk", "pass", detail)


def home(case: Case) -> Check:
    if case.facts.home_writable:
        return Check("Home", "pass", f"{case.facts.home} can be written to.")
    detail = f"No file can be made in {case.facts.home}."
    return Check("Home", "fail", detail, "Check its permissions, or export SILICON_HOME=/a/folder/of/yours")


# --- words and numbers ----------------------------------------------------------------------------------------------


def gib(size: int) -> str:
    """Bytes as GiB with one decimal."""
    return f"{size / 2**30:.1f} GiB"


def pair(version: str) -> tuple[int, int]:
    """Major and minor of a version; (0, 0) where there is none to read."""
    found = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def ratio(text: str | None, default: float) -> float:
    """A watermark as torch reads it, with C's strtod: the number at the start, and 0 where there is none."""
    if text is None:
        return default
    found = re.match(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)", text)
    return float(found[1]) if found else 0.0


CHECKS: tuple[Callable[[Case], Check | None], ...] = (
    python_architecture,
    python_version,
    macos_version,
    torch_version,
    mps_build,
    mps_device,
    cuda_device,
    matmul,
    watermarks,
    fallback,
    memory,
    memory_pressure,
    swap,
    power,
    low_power_mode,
    thermal,
    disk,
    home,
)
