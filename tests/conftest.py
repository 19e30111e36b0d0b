"""The command line in child processes on one computer or another, for tests of devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from siliconlm.data import builtin

WORKER = Path(__file__).parent / "simmps" / "child" / "worker.py"
TINY = {
    "model.n_layer": 2,
    "model.n_embd": 64,
    "model.n_head": 1,
    "model.n_kv_head": 1,
    "model.head_dim": 64,
    "model.n_ff": 128,
    "model.context": 64,
    "train.tokens_per_step": 512,
    "machine.threads": 1,
}


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in map(json.loads, self.out.splitlines()) if event.get("event") == kind]

    def ended(self, code: int = 0) -> Result:
        assert self.code == code, self.err or self.out
        return self


@dataclass(frozen=True, slots=True)
class Computer:
    """Child processes with a home of their own, and with `added` in their environment."""

    home: Path
    text: Path
    added: Mapping[str, str]

    def environment(self, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTORCH_", "SIMMPS_", "SILICON_", "PYTHON"))
        }
        fixed = {"SILICON_HOME": str(self.home), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        return {**kept, **fixed, **self.added, **more}

    def python(self, *words: str, stdin: str = "", **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=900,  # of a slow test; pytest ends the others sooner
            env=self.environment(**environment),
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def silicon(self, *words: str, **environment: str) -> Result:
        return self.python("-m", "siliconlm", *words, **environment)

    def silicons(self, *commands: list[str], **environment: str) -> list[Result]:
        """Several commands one after the other in one process, which pays for importing torch once."""
        done = self.python(str(WORKER), stdin=json.dumps(commands), **environment).ended()
        return [Result(*answer) for answer in done.json()]

    def training(self, name: str, steps: int, **settings: Any) -> list[str]:
        """The words of a tiny training; settings are written with a double underscore for the dot."""
        values = TINY | {key.replace("__", "."): value for key, value in settings.items()}
        words = [word for key, value in values.items() for word in ("--set", f"{key}={str(value).lower()}")]
        return [
            "train",
            "--data",
            "plays",
            "--profile",
            "none",
            "--name",
            name,
            "--steps",
            str(steps),
            "--json",
            *words,
        ]


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test keeps goes to a folder of the tests, unless it says which."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SILICON_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Computer:
    """A computer that shows no NVIDIA GPU, whose home holds the dataset `plays`."""
    folder = tmp_path_factory.mktemp("computer")
    text = folder / "plays.txt"
    text.write_text("".join(piece.text for piece in builtin.pieces(size=24_000, seed=7)))
    computer = Computer(folder / "home", text, {"CUDA_VISIBLE_DEVICES": ""})
    computer.silicon("prepare", str(text), "--name", "plays").ended()
    return computer
