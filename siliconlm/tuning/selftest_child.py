"""The self-test in a child process, for a driver can end the whole process over one operation (pytorch#149325)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict

from siliconlm.config import MachineConfig
from siliconlm.hardware.device import Device, open_device
from siliconlm.tuning.probe import child_environment
from siliconlm.tuning.selftest import Verdict, run

SECONDS = 120.0
CHILD = (sys.executable, "-P", "-m", "siliconlm.tuning.selftest_child")  # -P: nothing out of the current folder


def self_test(device: Device, seconds: float = SECONDS) -> Iterator[Verdict]:
    """The verdicts of `selftest.run` as they come. A child that dies or hangs is a failed verdict, not an error.

    The child runs without PYTORCH_ENABLE_MPS_FALLBACK: an operation done by the CPU instead would look sound.
    """
    environment = {name: value for name, value in child_environment().items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    machine = json.dumps({"device": device.kind, "threads": device.threads})
    with subprocess.Popen([*CHILD, machine], stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        clock = threading.Timer(seconds, child.kill)
        clock.start()
        try:
            last = "the start"
            for line in child.stdout:
                verdict = Verdict(**json.loads(line))
                last = verdict.name
                yield verdict
        finally:
            clock.cancel()
            child.kill()
    if child.returncode:
        detail = f"it ended with code {child.returncode} after {last}"
        yield Verdict("the self-test's process", False, float("inf"), 0.0, "always", detail)


def main() -> None:
    machine = MachineConfig(**json.loads(sys.argv[1]))
    for verdict in run(open_device(machine)):
        print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # an interpreter that ends right after a backward pass can be aborted by autograd's device thread
