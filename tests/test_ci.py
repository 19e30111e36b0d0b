"""The workflow for GitHub, as far as it can be checked without GitHub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_nothing_floats_and_nothing_may_write() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in STEPS if "uses" in step)
    for job in WORKFLOW["jobs"].values():
        assert re.search(r"-\d", job["runs-on"]) and job["timeout-minutes"] <= 60 and "continue-on-error" not in job


def test_what_it_runs_is_there() -> None:
    words = [word for step in STEPS for word in step.get("run", "").split()]
    assert {".ci/run", "tests/accelerator", "--device"} <= set(words)
    paths = [word for word in words if "/" in word and not word.startswith(".venv/")]
    assert all((ROOT / path).exists() for path in paths)
