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
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import Device, open_device
from siliconlm.tuning.child import die_with_parent
from siliconlm.tuning.probe import child_environment
from siliconlm.tuning.selftest import Verdict, run

SECONDS = 120.0
CHILD = (sys.executable, "-P", "-m", "siliconlm.tuning.selftest_child")  # -P: nothing out of the current folder


def self_test(device: Device, seconds: float = SECONDS) -> Iterator[Verdict]:
    """The verdicts of `selftest.run` as they come. A child that crashes or hangs is a failed verdict, not an error.

    SiliconError where the test could not be made, as for want of memory: that says nothing of the arithmetic. The
    child runs without PYTORCH_ENABLE_MPS_FALLBACK: an operation done by the CPU instead would look sound.
    """
    environment = {name: value for name, value in child_environment().items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    machine, pipe = json.dumps({"device": device.kind, "threads": device.threads}), subprocess.PIPE
    hung, last = threading.Event(), "the start"

    def stop() -> None:
        hung.set()
        child.kill()

    # The child's stdin stays open: by its end the child knows that this process has died.
    with subprocess.Popen([*CHILD, machine], stdin=pipe, stdout=pipe, env=environment, text=True) as child:
        assert child.stdout is not None
        clock = threading.Timer(seconds, stop)
        clock.start()
        try:
            for line in child.stdout:
                told = json.loads(line)
                if "failure" in told:
                    raise SiliconError(told["failure"], fix=told["fix"], kind=told["kind"])
                verdict = Verdict(**told)
                last = verdict.name
                yield verdict
        finally:
            clock.cancel()
            child.kill()
    if child.returncode == -9 and not hung.is_set():
        what = f"the self-test was killed after {last}, as a system does where memory runs out"
        raise SiliconError(what, fix="Close other programs and try again.", kind="out_of_memory")
    if child.returncode:
        detail = f"it hung after {last}" if hung.is_set() else f"it ended with code {child.returncode} after {last}"
        yield Verdict("the self-test's process", False, float("inf"), 0.0, "always", detail)


def main() -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    machine = MachineConfig(**json.loads(sys.argv[1]))
    try:
        for verdict in run(open_device(machine)):
            print(json.dumps(asdict(verdict)), flush=True)
    except SiliconError as error:
        print(json.dumps({"failure": error.what, "fix": error.fix, "kind": error.kind}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # an interpreter that ends right after a backward pass can be aborted by autograd's device thread
