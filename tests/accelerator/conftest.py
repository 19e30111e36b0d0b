"""The GPU of this computer, where torch finds one: Apple's or NVIDIA's."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from siliconlm.hardware.device import available


@pytest.fixture(scope="session")
def kind() -> str:
    """The kind of GPU that torch finds here."""
    best = available()[0]
    if best == "cpu":
        pytest.skip("torch finds no GPU here")
    return best


@pytest.fixture(scope="session")
def computer(kind: str, plain: Any) -> Any:
    """The home of `plain` on this computer as it is. A driver's warnings are its own business."""
    names = ("SIMMPS_LIB", "SIMMPS_OPS", "SIMMPS_RECOMMENDED", "PYTHONPATH")  # a pretend GPU to try these tests with
    here = {name: os.environ[name] for name in names if name in os.environ}
    return replace(plain, added={**here, "PYTHONWARNINGS": "default"})
