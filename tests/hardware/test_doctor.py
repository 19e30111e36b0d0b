from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siliconlm.hardware import doctor
from siliconlm.hardware import facts as facts_module
from siliconlm.hardware.doctor import HIGH, LOW, MATMUL_CAP, Check, TorchFacts, examine, matmul_is_capped
from siliconlm.hardware.facts import Facts

GIB = 2**30

MAC = Facts(
    system="Darwin",
    os_version="26.5",
    machine="arm64",
    python_version="3.12.4",
    translated=False,
    apple_silicon=True,
    chip="Apple M3 Pro",
    cores_performance=5,
    cores_efficiency=6,
    cores_logical=11,
    cores_physical=11,
    usable_cores=11,
    memory_total=18 * GIB,
    memory_available=11 * GIB,
    swap_total=0,
    swap_used=0,
    gpu_name="Apple M3 Pro",
    gpu_cores=14,
    power_source="AC",
    battery_percent=100,
    low_power_mode=False,
    thermal="nominal",
    wired_limit_mb=0,
    memory_pressure_level=1,
    memory_free_percent=80,
    disk_free=200 * GIB,
    home="/Users/ada/Library/Application Support/siliconlm",
    home_writable=True,
    environment={},
)
MAC_TORCH = TorchFacts("2.13.0", mps_built=True, mps_available=True, cuda_devices=(), recommended_memory=12 * GIB)
LINUX = replace(
    MAC,
    system="Linux",
    os_version="Ubuntu 24.04 LTS, kernel 6.8.0",
    machine="x86_64",
    translated=None,
    apple_silicon=False,
    chip="AMD EPYC",
    cores_performance=None,
    cores_efficiency=None,
    gpu_name=None,
    gpu_cores=None,
    power_source=None,
    battery_percent=None,
    low_power_mode=None,
    thermal=None,
    wired_limit_mb=None,
    memory_pressure_level=None,
    memory_free_percent=None,
    home="/home/ada/.local/share/siliconlm",
)
LINUX_TORCH = TorchFacts("2.13.0+cu130", False, False, ("NVIDIA GeForce RTX 4090",), None)
NO_TORCH = TorchFacts(None, False, False, (), None, import_error="No module named 'torch'")

MAC_NAMES = [
    "Python architecture",
    "Python",
    "macOS",
    "torch",
    "MPS build",
    "MPS device",
    "MPS memory limit",
    "MPS fallback",
    "Memory",
    "Memory pressure",
    "Swap",
    "Power",
    "Low power mode",
    "Heat",
    "Disk",
    "Home",
]


def find(name: str, facts: Facts = MAC, torch: TorchFacts = MAC_TORCH, **changes: Any) -> Check | None:
    found = [check for check in examine(replace(facts, **changes), torch) if check.name == name]
    assert len(found) <= 1
    return found[0] if found else None


def status(name: str, facts: Facts = MAC, torch: TorchFacts = MAC_TORCH, **changes: Any) -> str | None:
    check = find(name, facts, torch, **changes)
    return check.status if check else None


# --- whole lists ----------------------------------------------------------------------------------------------------


def test_a_good_mac_passes_everything() -> None:
    checks = examine(MAC, MAC_TORCH)
    assert [check.name for check in checks] == MAC_NAMES
    assert {check.status for check in checks} == {"pass"}
    assert not any(check.remedy for check in checks)


def test_a_good_linux_machine_passes_everything_that_applies() -> None:
    checks = examine(LINUX, LINUX_TORCH)
    assert [check.name for check in checks] == ["Python", "torch", "GPU", "Memory", "Swap", "Disk", "Home"]
    assert {check.status for check in checks} == {"pass"}


def test_a_bad_mac_gets_a_remedy_for_each_finding() -> None:
    bad = replace(
        MAC,
        os_version="13.6",
        python_version="3.9.6",
        chip="Apple M1",
        memory_total=7 * GIB,
        swap_used=3 * GIB,
        power_source="battery",
        low_power_mode=True,
        thermal="limited to 50 %",
        memory_pressure_level=4,
        disk_free=GIB // 2,
        home_writable=False,
        environment={HIGH: "0.8", "PYTORCH_ENABLE_MPS_FALLBACK": "1"},
    )
    checks = examine(bad, replace(MAC_TORCH, version="2.12.1", mps_available=False))
    troubled = [check for check in checks if check.status != "pass"]
    assert {check.name for check in troubled} == (set(MAC_NAMES) | {"Matrix products"}) - {
        "Python architecture",
        "MPS build",
    }
    assert all(check.remedy and check.detail for check in troubled)
    failed = {check.name for check in checks if check.status == "fail"}
    assert failed == {"Python", "macOS", "torch", "MPS memory limit", "Disk", "Home"}


def test_rosetta_without_torch_says_first_things_first() -> None:
    checks = examine(replace(MAC, machine="x86_64", translated=True, chip="VirtualApple @ 2.50GHz"), NO_TORCH)
    failed = [check for check in checks if check.status == "fail"]
    assert [check.name for check in failed] == ["Python architecture", "torch"]
    assert "Python architecture" in failed[1].remedy
    assert not any(check.name.startswith("MPS") for check in checks)


# --- software -------------------------------------------------------------------------------------------------------


def test_architecture() -> None:
    rosetta = find("Python architecture", machine="x86_64", translated=True)
    assert rosetta is not None and rosetta.status == "fail"
    assert "Rosetta" in rosetta.detail and "aarch64" in rosetta.remedy
    assert status("Python architecture", machine="x86_64", translated=None) == "fail"
    intel = find("Python architecture", machine="x86_64", translated=None, apple_silicon=False, chip="Intel Core i7")
    assert intel is not None and intel.status == "fail" and "2.2.2" in intel.detail
    assert status("Python architecture", LINUX, LINUX_TORCH) is None


@pytest.mark.parametrize(
    ("version", "expected"), [("3.11.0", "pass"), ("3.15.0rc1", "pass"), ("3.10.14", "fail"), ("3.9.6", "fail")]
)
def test_python_version(version: str, expected: str) -> None:
    assert status("Python", python_version=version) == expected


@pytest.mark.parametrize(
    ("version", "expected"), [("14.0", "pass"), ("26.5", "pass"), ("13.7.8", "fail"), ("", "warn"), ("?", "warn")]
)
def test_macos_version(version: str, expected: str) -> None:
    assert status("macOS", os_version=version) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0", "pass"), ("2.14.0.dev20260901", "pass"), ("3.0.0+cpu", "pass"), ("2.9.1", "fail"), ("?", "fail")],
)
def test_torch_version(version: str, expected: str) -> None:
    assert status("torch", torch=replace(MAC_TORCH, version=version)) == expected
    assert status("torch", LINUX, replace(LINUX_TORCH, version=version)) == expected


def test_torch_missing_gives_the_reason() -> None:
    check = find("torch", LINUX, NO_TORCH)
    assert check is not None and check.status == "fail"
    assert "No module named 'torch'" in check.detail and 'torch>=2.13"' in check.remedy


def test_the_oldest_torch_is_an_argument() -> None:
    assert [c.status for c in examine(LINUX, LINUX_TORCH, min_torch=(2, 14)) if c.name == "torch"] == ["fail"]


# --- accelerator ----------------------------------------------------------------------------------------------------


def test_torch_without_mps() -> None:
    torch = replace(MAC_TORCH, mps_built=False, mps_available=False)
    assert status("MPS build", torch=torch) == "warn"
    assert status("MPS device", torch=torch) is None


def test_mps_built_but_unavailable_reports_both_facts() -> None:
    torch = replace(MAC_TORCH, mps_available=False, recommended_memory=None)
    assert status("MPS build", torch=torch) == "pass"
    check = find("MPS device", torch=torch)
    assert check is not None and check.status == "warn"
    assert "Built into torch: yes" in check.detail and "Available: no" in check.detail


def test_mps_device_names_the_gpu_and_its_memory() -> None:
    check = find("MPS device", wired_limit_mb=14000)
    assert check is not None and check.status == "pass"
    assert check.detail == "Apple M3 Pro, 14 cores, 12.0 GiB recommended at most, iogpu.wired_limit_mb set to 14000"
    bare = find("MPS device", torch=replace(MAC_TORCH, recommended_memory=None), gpu_name=None, gpu_cores=None)
    assert bare is not None and bare.detail == "Apple M3 Pro"


def test_gpu_on_linux() -> None:
    assert status("GPU", LINUX, LINUX_TORCH) == "pass"
    assert status("GPU", LINUX, replace(LINUX_TORCH, cuda_devices=())) == "warn"
    assert status("GPU") is None


@pytest.mark.parametrize(
    ("chip", "version", "expected"),
    [
        ("Apple M1", "2.13.0", "warn"),
        ("Apple M2 Ultra", "2.13.1", "warn"),
        ("Apple M1 Pro", "2.14.0", "pass"),
        ("Apple M3 Pro", "2.13.0", None),
        ("Apple M10", "2.13.0", None),
        ("VirtualApple @ 2.50GHz", "2.13.0", None),
    ],
)
def test_matmul(chip: str, version: str, expected: str | None) -> None:
    assert status("Matrix products", torch=replace(MAC_TORCH, version=version), chip=chip) == expected
    assert matmul_is_capped(chip, version) == (expected == "warn")


def test_matmul_names_the_cap_and_the_issue() -> None:
    check = find("Matrix products", chip="Apple M2")
    assert check is not None and "32,512" in check.detail and "177116" in check.detail
    assert MATMUL_CAP < 32_767


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "pass"),
        ({HIGH: "1.4"}, "pass"),
        ({HIGH: "2.0"}, "pass"),
        ({HIGH: "0.8", LOW: "0.7"}, "pass"),
        ({LOW: "1.0"}, "pass"),
        ({HIGH: "0.0"}, "warn"),
        ({HIGH: "0", LOW: "1.9"}, "warn"),
        ({HIGH: "off"}, "warn"),
        ({HIGH: ""}, "warn"),
        ({HIGH: "0.8"}, "fail"),
        ({HIGH: "1.39"}, "fail"),
        ({HIGH: "0.8x"}, "fail"),
        ({HIGH: "0.5", LOW: "0.6"}, "fail"),
        ({HIGH: "2.1"}, "fail"),
        ({HIGH: "-1"}, "fail"),
        ({LOW: "1.8"}, "fail"),
        ({LOW: "-0.1"}, "fail"),
        ({HIGH: "1e999"}, "fail"),
    ],
)
def test_watermarks(environment: dict[str, str], expected: str) -> None:
    assert status("MPS memory limit", environment=environment) == expected
    assert status("MPS memory limit", LINUX, LINUX_TORCH, environment=environment) is None


@pytest.mark.parametrize(("value", "expected"), [("1", "warn"), ("0", "pass"), ("yes", "warn")])
def test_fallback(value: str, expected: str) -> None:
    assert status("MPS fallback", environment={"PYTORCH_ENABLE_MPS_FALLBACK": value}) == expected


# --- the computer's state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "available", "expected"),
    [(8 * GIB, 3 * GIB, "pass"), (7 * GIB, 3 * GIB, "warn"), (16 * GIB, GIB // 2, "warn")],
)
def test_memory(total: int, available: int, expected: str) -> None:
    assert status("Memory", memory_total=total, memory_available=available) == expected


def test_figures_are_gib_with_one_decimal() -> None:
    check = find("Memory", memory_total=25769803776, memory_available=10 * GIB + GIB // 4)
    assert check is not None and check.detail == "24.0 GiB, 10.2 GiB available"


@pytest.mark.parametrize(
    ("level", "free", "expected"),
    [
        (1, 80, "pass"),
        (1, None, "pass"),
        (None, 50, "pass"),
        (2, 30, "warn"),
        (4, 3, "warn"),
        (1, 9, "warn"),
        (None, None, None),
    ],
)
def test_memory_pressure(level: int | None, free: int | None, expected: str | None) -> None:
    assert status("Memory pressure", memory_pressure_level=level, memory_free_percent=free) == expected


@pytest.mark.parametrize(
    ("used", "total", "expected"),
    [(0, 8 * GIB, "pass"), (GIB // 2, 8 * GIB, "pass"), (GIB, 64 * GIB, "warn"), (GIB // 2, GIB, "warn")],
)
def test_swap(used: int, total: int, expected: str) -> None:
    assert status("Swap", swap_used=used, swap_total=4 * GIB, memory_total=total) == expected


def test_power() -> None:
    assert status("Power", power_source="AC", battery_percent=None) == "pass"
    check = find("Power", power_source="battery", battery_percent=27)
    assert check is not None and check.status == "warn" and "27 %" in check.detail
    assert status("Power", power_source="battery", battery_percent=None) == "warn"
    assert status("Power", power_source=None) is None


@pytest.mark.parametrize(("on", "expected"), [(True, "warn"), (False, "pass"), (None, None)])
def test_low_power_mode(on: bool | None, expected: str | None) -> None:
    assert status("Low power mode", low_power_mode=on) == expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [("nominal", "pass"), ("limited to 50 %", "warn"), ("warning level 1", "warn"), (None, None)],
)
def test_heat(state: str | None, expected: str | None) -> None:
    assert status("Heat", thermal=state) == expected


@pytest.mark.parametrize(
    ("free", "expected"), [(5 * GIB, "pass"), (3 * GIB, "warn"), (GIB // 2, "fail"), (0, "fail"), (None, None)]
)
def test_disk(free: int | None, expected: str | None) -> None:
    assert status("Disk", disk_free=free) == expected


def test_home() -> None:
    assert status("Home") == "pass"
    check = find("Home", home_writable=False)
    assert check is not None and check.status == "fail" and "SILICON_HOME" in check.remedy


# --- always ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from([MAC, LINUX]), st.text(max_size=30), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_odd_words_never_break_an_examination(facts: Facts, odd: str, built: bool, available: bool) -> None:
    environment = {HIGH: odd, LOW: odd, "PYTORCH_ENABLE_MPS_FALLBACK": odd}
    strange = replace(facts, os_version=odd, chip=odd, python_version=odd, thermal=odd, environment=environment)
    for check in examine(strange, TorchFacts(odd, built, available, (odd,), None)):
        assert check.detail is not None and (check.status == "pass") == (not check.remedy)


def test_device_names_are_left_to_the_device_file() -> None:
    for module in (doctor, facts_module):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not literals & {"mps", "cuda", "cpu"}
