"""The self-test's child process: real ones, sound, killed and hanging."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from siliconlm import engine
from siliconlm.cli.app import main
from siliconlm.config import MachineConfig
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import open_device
from siliconlm.tuning import selftest_child
from siliconlm.tuning.verdicts import known, remembering

SOUND = '{"name": "matmul", "passed": true, "error": 1e-6, "limit": 1e-3, "needed": "always", "detail": ""}'
CHILDREN = {
    "killed": f"import os; print('{SOUND}', flush=True); os.kill(os.getpid(), 6)",
    "hanging": f"import threading; print('{SOUND}', flush=True); threading.Event().wait()",
}


@pytest.mark.parametrize("fate", sorted(CHILDREN))
def test_a_child_that_dies_or_hangs_is_a_failed_verdict(fate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_child, "CHILD", (sys.executable, "-c", CHILDREN[fate]))
    device = open_device(MachineConfig(threads=1))
    first, last = list(selftest_child.self_test(device, seconds=2.0))
    assert first.passed and first.name == "matmul"
    assert not last.passed and last.needed == "always" and "after matmul" in last.detail


FULL = '{"failure": "no memory for the check of linear", "fix": "Close programs.", "kind": "out_of_memory"}'
WANT = {
    "it says so": f"print('{SOUND}'); print('{FULL}')",
    "the system kills it": f"import os; print('{SOUND}', flush=True); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("fate", sorted(WANT))
def test_want_of_memory_says_nothing_of_the_arithmetic_and_is_not_remembered(
    fate: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path))
    monkeypatch.setattr(selftest_child, "CHILD", (sys.executable, "-c", WANT[fate]))
    device = open_device(MachineConfig(threads=1))
    with pytest.raises(SiliconError) as raised:
        list(remembering(device, selftest_child.self_test(device)))
    assert raised.value.kind == "out_of_memory" and raised.value.fix
    assert known(device) is None


def test_the_child_ends_with_its_parent() -> None:
    machine = json.dumps({"device": "cpu", "threads": 1})
    with subprocess.Popen([*selftest_child.CHILD, machine], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        child.stdin.close()
        assert child.wait(timeout=60) == 1, "it did not run to its end"


def test_doctor_tells_what_the_self_test_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real child on this machine's CPU."""
    monkeypatch.setattr(sys, "argv", ["silicon", "doctor", "--device", "cpu", "--self-test", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and told["healthy"]
    assert len(told["self_test"]) > 25 and all(test["passed"] for test in told["self_test"])


def test_a_failed_check_comes_with_what_to_do_and_can_be_tested_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path))
    monkeypatch.setattr(selftest_child, "CHILD", (sys.executable, "-c", CHILDREN["killed"]))
    *_, last = engine.self_test("cpu")
    assert not last.passed and last.error is None and "--device" in last.remedy
    monkeypatch.setattr(sys, "argv", ["silicon", "doctor", "--device", "cpu", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    (failed,) = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["status"] == "fail"]
    assert ended.value.code == 1 and "after matmul" in failed["detail"] and "--self-test" in failed["remedy"]
