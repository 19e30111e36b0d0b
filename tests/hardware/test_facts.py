from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siliconlm.hardware import facts
from siliconlm.hardware.facts import (
    ask,
    cgroups,
    container_memory,
    gather,
    in_words,
    is_writable,
    nearest_existing,
    parse_cgroup,
    parse_count,
    parse_cpu_max,
    parse_cpuinfo,
    parse_displays,
    parse_inactive_file,
    parse_lowpowermode,
    parse_memory_pressure,
    parse_peak_resident,
    parse_perflevels,
    parse_pmset_batt,
    parse_pmset_therm,
    parse_pressure_level,
    parse_sw_vers,
    parse_swapusage,
    parse_vm_stat,
)

GIB = 2**30

SW_VERS = "ProductName:\t\tmacOS\nProductVersion:\t\t26.5\nBuildVersion:\t\t25F71\n"
SWAPUSAGE = "vm.swapusage: total = 4096.00M  used = 2694.19M  free = 1401.81M  (encrypted)\n"
MEMORY_PRESSURE = (
    "The system has 25769803776 (1572864 pages with a page size of 16384).\nSystem-wide memory free percentage: 80%\n"
)
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               39656.
Pages active:                            591525.
Pages inactive:                          590748.
Pages speculative:                         5060.
Pages throttled:                              0.
Pages wired down:                        212530.
Pages purgeable:                          11333.
"Translation faults":                 593951200.
Pages copy-on-write:                   12345678.
Pages occupied by compressor:             90849.
Swapins:                                 997990.
Swapouts:                               1484124.
"""
VM_STAT_RUN_TOGETHER = (
    "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
    "Pages free:                               39656.\n"
    "Pages active: 591525. inactive: 590748. speculative: 5060. throttled: 0. wired down: 212530. purgeable: 11333.\n"
)
THERM_COOL = "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
THERM_NOTIFY = (
    "2026-08-20 05:08:37 -0700 CPU Power notify\n"
    "\tCPU_Scheduler_Limit \t= 100\n\tCPU_Available_CPUs \t= 12\n\tCPU_Speed_Limit \t= 100\n"
)
BATT_CHARGED = (
    "Now drawing from 'AC Power'\n -InternalBattery-0 (id=24576099)\t100%; charged; 0:00 remaining present: true\n"
)
BATT_DRAINING = (
    "Now drawing from 'Battery Power'\n"
    " -InternalBattery-0 (id=24313955)\t27%; discharging; 3:32 remaining present: true\n"
)
BATT_DESKTOP = "Now drawing from 'AC Power'\n"
PMSET = "Currently in use:\n standby              1\n sleep                1 (sleep prevented by caffeinate)\n"
DISPLAYS = json.dumps(
    {
        "SPDisplaysDataType": [
            {
                "_name": "Apple M4",
                "spdisplays_mtlgpufamilysupport": "spdisplays_metal4",
                "spdisplays_vendor": "sppci_vendor_Apple",
                "sppci_bus": "spdisplays_builtin",
                "sppci_cores": "10",
                "sppci_device_type": "spdisplays_gpu",
                "sppci_model": "Apple M4",
            }
        ]
    }
)
PERFLEVELS = "hw.perflevel0.logicalcpu: 16\nhw.perflevel1.logicalcpu: 8\n"
CPUINFO = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
CGROUP_V1 = "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu:/\n0::/\n"
MEMORY_STAT = "cache 900\ninactive_file 100\ntotal_cache 900\ntotal_inactive_file 300\n"


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`gather` tries to write into the home: never into the real one."""
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))


def levels(*pairs: tuple[str, int]) -> str:
    lines = [
        f"hw.perflevel{i}.name: {name}\nhw.perflevel{i}.logicalcpu: {count}" for i, (name, count) in enumerate(pairs)
    ]
    return "\n".join(lines)


CASES: list[tuple[Callable[[str | None], object], str, object]] = [
    (parse_sw_vers, SW_VERS, "26.5"),
    (parse_sw_vers, "ProductName: macOS\nProductVersion: 12.7.6\nBuildVersion: 21H1320\n", "12.7.6"),
    (parse_sw_vers, "26.5\n", "26.5"),
    (parse_sw_vers, "15\n", "15"),
    (parse_count, "25769803776\n", 25769803776),
    (parse_count, "0\n", 0),
    (parse_count, "max\n", None),
    (parse_count, "1 2", None),
    (parse_count, "9" * 5000, None),
    (parse_swapusage, SWAPUSAGE, (4096 * 2**20, round(2694.19 * 2**20))),
    (parse_swapusage, "total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)\n", (0, 0)),
    (parse_swapusage, "total = 2.00G  used = 1.00G  free = 1.00G\n", (2 * GIB, GIB)),
    (parse_swapusage, "total = 4096.00M  free = 1401.81M", None),
    (parse_vm_stat, VM_STAT, (39656 + 590748 + 5060 + 11333) * 16384),
    (parse_vm_stat, VM_STAT_RUN_TOGETHER, (39656 + 590748 + 5060 + 11333) * 16384),
    (parse_vm_stat, VM_STAT.replace("16384", "4096"), (39656 + 590748 + 5060 + 11333) * 4096),
    (parse_vm_stat, VM_STAT.replace("page size", "size"), None),
    (parse_vm_stat, VM_STAT.replace("Pages free", "Pages"), None),
    (parse_pmset_therm, THERM_COOL, "nominal"),
    (parse_pmset_therm, THERM_COOL + THERM_NOTIFY, "nominal"),
    (parse_pmset_therm, THERM_NOTIFY, "nominal"),
    (parse_pmset_therm, THERM_COOL + "\tCPU_Scheduler_Limit = 100\n\tCPU_Speed_Limit \t= 35\n", "limited to 35 %"),
    (parse_pmset_therm, "CPU_Scheduler_Limit = 60\nCPU_Speed_Limit = 100\n", "limited to 60 %"),
    (parse_pmset_therm, "2026-08-20 13:11:08 +0700 Thermal Warning Level = 1\n", "warning level 1"),
    (parse_pmset_therm, "Thermal Warning Level = 0\n", "nominal"),
    (parse_pmset_therm, "Error: No thermal warning level with error code 0xe00002bc\n", None),
    (parse_pmset_therm, "CPU_Speed_Limit = 999\n", None),
    (parse_pmset_batt, BATT_CHARGED, ("AC", 100)),
    (parse_pmset_batt, BATT_DRAINING, ("battery", 27)),
    (parse_pmset_batt, BATT_DESKTOP, ("AC", None)),
    (parse_pmset_batt, "Now drawing from 'UPS Power'\n -UPS (id=1)\t90%; discharging;\n", ("battery", None)),
    (parse_pmset_batt, "Now drawing from 'Fusion'\n", None),
    (parse_lowpowermode, PMSET + " lowpowermode         0\n womp                 1\n", False),
    (parse_lowpowermode, PMSET + " lowpowermode         1\n", True),
    (parse_lowpowermode, "lowpowermode         0", False),
    (parse_lowpowermode, PMSET + " powermode            1\n", True),
    (parse_lowpowermode, PMSET + " powermode            2\n", False),
    (parse_lowpowermode, PMSET, None),
    (parse_displays, DISPLAYS, ("Apple M4", 10)),
    (parse_displays, '{"SPDisplaysDataType": [{"_name": "AMD Radeon Pro 5500M"}]}', ("AMD Radeon Pro 5500M", None)),
    (
        parse_displays,
        '{"SPDisplaysDataType": [{"_name": "eGPU"}, 3, {"sppci_model": "Apple M2", "sppci_cores": "8"}]}',
        ("Apple M2", 8),
    ),
    (parse_displays, '{"SPDisplaysDataType": []}', None),
    (parse_displays, '{"SPDisplaysDataType": [{"_name": 4}]}', None),
    (parse_displays, "[1]", None),
    (parse_displays, "[" * 100_000, None),
    (parse_memory_pressure, MEMORY_PRESSURE, 80),
    (parse_memory_pressure, "System-wide memory free percentage: 180%", None),
    (parse_pressure_level, "1\n", 1),
    (parse_pressure_level, "4\n", 4),
    (parse_pressure_level, "3\n", None),
    (parse_perflevels, PERFLEVELS, (16, 8)),
    (parse_perflevels, levels(("Performance", 5), ("Efficiency", 6)), (5, 6)),
    (parse_perflevels, levels(("Performance", 4), ("Performance", 6), ("Efficiency", 4)), (10, 4)),
    (parse_perflevels, levels(("Super", 6), ("Performance", 12)), (18, 0)),
    (parse_perflevels, levels(("Standard", 8)), (8, 0)),
    (parse_perflevels, "hw.perflevel0.name: Performance", None),
    (parse_cpuinfo, CPUINFO, "AMD EPYC"),
    (parse_cpuinfo, "processor\t: 0\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n", "Raspberry Pi 5 Model B Rev 1.0"),
    (parse_cpuinfo, "processor\t: 0\nmodel name\t:\n", None),
    (parse_cgroup, CGROUP_V1, [("memory", "/docker/abc"), ("", "/")]),
    (parse_cgroup, "0::/user.slice\n", [("", "/user.slice")]),
    (parse_cgroup, "5:cpuset,memory:/a\n", [("memory", "/a")]),
    (parse_peak_resident, "VmPeak:\t   9 kB\nVmHWM:\t    1956 kB\nVmRSS:\t    1900 kB\n", 1956 << 10),
    (parse_peak_resident, "VmPeak:\t   9 kB\n", None),
    (parse_inactive_file, MEMORY_STAT, 300),
    (parse_inactive_file, "anon 5\ninactive_file 100\n", 100),
    (parse_inactive_file, "anon 5\n", None),
    (parse_cpu_max, "150000 100000\n", 2),
    (parse_cpu_max, "max 100000\n", None),
    (parse_cpu_max, "100000 0\n", None),
]
PARSERS = list(dict.fromkeys(parser for parser, _, _ in CASES))
SAMPLES = list(dict.fromkeys(text for _, text, _ in CASES if len(text) < 2000))


@pytest.mark.parametrize(("parser", "text", "expected"), CASES)
def test_samples(parser: Callable[[str | None], object], text: str, expected: object) -> None:
    assert parser(text) == expected


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("text", [None, "", "garbage", "\x00", "%", "{}", "-1", ": ="])
def test_nothing_out_of_garbage(parser: Callable[[str | None], object], text: str | None) -> None:
    assert not parser(text)


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_no_parser_raises_on_any_text(text: str) -> None:
    for parser in PARSERS:
        parser(text)


@given(st.sampled_from(SAMPLES), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_parser_raises_on_mutated_samples(sample: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(sample)))
    end = data.draw(st.integers(start, min(len(sample), start + 20)))
    middle = data.draw(st.text(max_size=10) | st.sampled_from(["9" * 400, "-", "٣", ".", "null", "\n", "%", "="]))
    for parser in PARSERS:
        parser(sample[:start] + middle + sample[end:])


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    )
)
@settings(max_examples=50, deadline=None)
def test_displays_takes_any_shape_of_json(value: object) -> None:
    parse_displays(json.dumps(value))
    parse_displays(json.dumps({"SPDisplaysDataType": value}))
    assert parse_displays(json.dumps({"SPDisplaysDataType": [{"_name": "GPU", "sppci_cores": value}]})) is not None


# --- asking ---------------------------------------------------------------------------------------------------------


def test_ask_answers() -> None:
    assert ask(sys.executable, "-c", "print('26.5')") == "26.5\n"


def test_ask_survives_bytes_that_are_not_text() -> None:
    assert ask(sys.executable, "-c", "import sys; sys.stdout.buffer.write(b'\\xff7')") == "\ufffd7"


def test_ask_gives_none_for_failure_and_absence() -> None:
    assert ask("no-such-command-anywhere") is None
    assert ask(sys.executable, "-c", "raise SystemExit(1)") is None


def test_ask_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "ASK_SECONDS", 0.2)
    assert ask(sys.executable, "-c", "import time; time.sleep(30)") is None


def test_torch_is_not_imported() -> None:
    code = "import sys, siliconlm.hardware.facts, siliconlm.hardware.doctor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# --- the whole reading ----------------------------------------------------------------------------------------------

M3_PRO = {
    "sw_vers -productVersion": "26.5\n",
    "sysctl -n sysctl.proc_translated": "0\n",
    "sysctl -n hw.optional.arm64": "1\n",
    "sysctl -n machdep.cpu.brand_string": "Apple M3 Pro\n",
    "sysctl -n hw.nperflevels": "2\n",
    "sysctl -n hw.perflevel0.name": "Performance\n",
    "sysctl -n hw.perflevel0.logicalcpu": "5\n",
    "sysctl -n hw.perflevel1.name": "Efficiency\n",
    "sysctl -n hw.perflevel1.logicalcpu": "6\n",
    "sysctl -n vm.swapusage": SWAPUSAGE.removeprefix("vm.swapusage: "),
    "sysctl -n iogpu.wired_limit_mb": "0\n",
    "sysctl -n kern.memorystatus_vm_pressure_level": "1\n",
    "vm_stat": VM_STAT,
    "memory_pressure -Q": MEMORY_PRESSURE,
    "system_profiler SPDisplaysDataType -json": DISPLAYS.replace("M4", "M3 Pro").replace('"10"', '"14"'),
    "pmset -g": PMSET + " lowpowermode         0\n",
    "pmset -g therm": THERM_COOL,
    "pmset -g batt": BATT_DRAINING,
}


def pretend_mac(monkeypatch: pytest.MonkeyPatch, machine: str, answers: dict[str, str]) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("", ("", "", ""), ""))
    monkeypatch.setattr(facts, "ask", lambda *command: answers.get(" ".join(command)))


def test_gather_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.8")
    pretend_mac(monkeypatch, "arm64", M3_PRO)
    found = gather()
    assert (found.system, found.os_version, found.chip) == ("Darwin", "26.5", "Apple M3 Pro")
    assert (found.translated, found.apple_silicon) == (False, True)
    assert (found.cores_performance, found.cores_efficiency) == (5, 6)
    assert (found.swap_total, found.swap_used) == (4 * GIB, round(2694.19 * 2**20))
    assert 0 < found.memory_available <= found.memory_total
    assert (found.gpu_name, found.gpu_cores) == ("Apple M3 Pro", 14)
    assert (found.power_source, found.battery_percent, found.low_power_mode) == ("battery", 27, False)
    assert (found.thermal, found.wired_limit_mb) == ("nominal", 0)
    assert (found.memory_pressure_level, found.memory_free_percent) == (1, 80)
    assert found.environment["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "0.8"


def test_a_mac_in_words_by_quick_questions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_mac(monkeypatch, "arm64", M3_PRO)
    answers, asked = facts.ask, []
    monkeypatch.setattr(facts, "ask", lambda *command: asked.append(command[0]) or answers(*command))
    monkeypatch.setattr(facts, "usable_cores", lambda: 11)
    words = in_words("Apple M3 Pro", "2.13.0")
    assert re.fullmatch(r"Apple M3 Pro, 11 cores \(5\+6\), \d+ GiB, macOS 26\.5; Python [\d.]+, torch 2\.13\.0", words)
    assert set(asked) <= {"sysctl", "sw_vers", "vm_stat"} and len(asked) <= 8


def test_a_graphics_card_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "chip", lambda mac: "Threadripper")
    assert in_words("NVIDIA H200", "2.13.0").startswith("NVIDIA H200 with Threadripper, ")


def test_gather_under_rosetta(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = M3_PRO | {
        "sysctl -n sysctl.proc_translated": "1\n",
        "sysctl -n machdep.cpu.brand_string": "VirtualApple @ 2.50GHz",
    }
    pretend_mac(monkeypatch, "x86_64", answers)
    found = gather()
    assert (found.translated, found.apple_silicon, found.machine) == (True, True, "x86_64")


def test_gather_on_an_intel_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_mac(monkeypatch, "x86_64", {"sysctl -n machdep.cpu.brand_string": "Intel(R) Core(TM) i7-8750H\n"})
    found = gather()
    assert (found.translated, found.apple_silicon) == (None, False)
    assert found.chip.startswith("Intel")


def test_gather_on_a_mac_that_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_mac(monkeypatch, "arm64", {})
    found = gather()
    assert found.apple_silicon and found.chip == "arm64"
    for name in ("translated", "cores_performance", "gpu_name", "power_source", "low_power_mode", "thermal"):
        assert getattr(found, name) is None


def test_gather_here(tmp_path: Path) -> None:
    found = gather()
    assert found.home == str(tmp_path / "home") and found.home_writable
    assert found.python_version == platform.python_version()
    assert 0 < found.memory_available <= found.memory_total
    assert 1 <= found.usable_cores <= found.cores_logical
    assert found.disk_free is not None and found.disk_free > 0
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(platform.system() == "Darwin", reason="on a Mac they are to be run")
def test_no_command_is_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*command: str) -> str | None:
        raise AssertionError(command)

    monkeypatch.setattr(facts, "ask", refuse)
    assert gather().translated is None


# --- the home -------------------------------------------------------------------------------------------------------


def test_nearest_existing(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(Path("no-such-folder-here") / "b") == Path(".")


def test_a_home_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert is_writable(tmp_path)
    assert not is_writable(tmp_path / "file")
    assert not is_writable(tmp_path / "file" / "home")


def test_a_refused_home_is_not_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    assert not is_writable(tmp_path)


# --- containers -----------------------------------------------------------------------------------------------------


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_container_v2_limit_of_an_outer_group_holds(tmp_path: Path) -> None:
    group(tmp_path / "pod" / "inner", memory__max="max", memory__current=3 * GIB)
    group(tmp_path / "pod", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"inactive_file {GIB}")
    assert container_memory(cgroups("0::/pod/inner\n", tmp_path)) == (4 * GIB, 2 * GIB)


def test_container_v1_seen_from_inside(tmp_path: Path) -> None:
    stat = f"inactive_file 0\ntotal_inactive_file {GIB}"
    usage = {"memory__limit_in_bytes": 4 * GIB, "memory__usage_in_bytes": 2 * GIB, "memory__stat": stat}
    group(tmp_path / "memory", **usage)
    assert container_memory(cgroups("4:memory:/docker/abc\n0::/\n", tmp_path)) == (4 * GIB, 3 * GIB)


def test_container_without_a_limit(tmp_path: Path) -> None:
    group(tmp_path, memory__max="max", memory__current=1)
    assert container_memory(cgroups("0::/../outside\n", tmp_path)) is None
    assert container_memory(cgroups("", tmp_path)) is None


def test_container_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path, memory__max=GIB, memory__current=2 * GIB)
    assert container_memory(cgroups("0::/\n", tmp_path)) == (GIB, 0)


def test_memory_and_cores_respect_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group(tmp_path, memory__max=2**28, memory__current=2**27, cpu__max="50000 100000")
    monkeypatch.setattr(facts, "cgroups", lambda: [tmp_path])
    assert facts.memory(mac=False) == (2**28, 2**27)
    assert facts.usable_cores() == 1
