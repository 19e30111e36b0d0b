"""The self-test's child process: real ones, sound, killed and hanging."""

from __future__ import annotations

import json
import sys

import pytest

from siliconlm import engine
from siliconlm.cli.app import main
from siliconlm.config import MachineConfig
from siliconlm.hardware.device import open_device
from siliconlm.tuning import selftest_child

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


def test_a_failed_check_comes_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_child, "CHILD", (sys.executable, "-c", CHILDREN["killed"]))
    *_, last = engine.self_test("cpu")
    assert not last.passed and last.error is None and "--device" in last.remedy
