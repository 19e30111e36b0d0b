"""A pretend Apple GPU (simmps.cpp) for Linux: real autograd, autocast and torch.mps, in child processes.

It lacks the operators that Apple GPUs lack, its memory has an end, and it refuses float64 and mixed devices. It says
nothing about Metal's numbers. Registering it is for good, so no test process loads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from siliconlm.data import builtin

HERE = Path(__file__).parent
CHILD = HERE / "child"
RECOMMENDED = 2 << 30  # bytes, unless a test says otherwise
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
    """Child processes with a home of their own, and with the pretend GPU where `library` names one."""

    home: Path
    text: Path
    library: Path | None = None

    def environment(self, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTORCH_", "SIMMPS_", "SILICON_", "PYTHON"))
        }
        fixed = {"SILICON_HOME": str(self.home), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        fixed["CUDA_VISIBLE_DEVICES"] = ""
        if self.library:
            ops = HERE / "ops" / "mps_ops_2.13.txt"
            fixed |= {"SIMMPS_LIB": str(self.library), "SIMMPS_OPS": str(ops), "PYTHONPATH": str(CHILD)}
            fixed |= {"SIMMPS_RECOMMENDED": str(RECOMMENDED)}
        return kept | fixed | more

    def python(self, *words: str, stdin: str = "", **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            env=self.environment(**environment),
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def silicon(self, *words: str, **environment: str) -> Result:
        return self.python("-m", "siliconlm", *words, **environment)

    def silicons(self, *commands: list[str], **environment: str) -> list[Result]:
        """Several commands one after the other in one process, which pays for importing torch once."""
        done = self.python(str(CHILD / "worker.py"), stdin=json.dumps(commands), **environment).ended()
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


def build(folder: Path) -> Path:
    """Compile the pretend GPU, once for each text of it and version of torch."""
    source = HERE / "simmps.cpp"
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"libsimmps-{key}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        parts = Path(torch.__file__).parent
        new = folder / f"{library.name}.{os.getpid()}"
        includes = [f"-I{parts / 'include'}", f"-I{parts / 'include/torch/csrc/api/include'}"]
        links = [f"-L{parts / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, *includes, str(source), *links, "-o", str(new)], check=True, timeout=280)
        new.replace(library)  # another test process may be building it as well
    return library


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Path:
    if sys.platform != "linux":
        pytest.skip("the pretend Apple GPU is for Linux")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; it builds the pretend Apple GPU")
    return build(pytestconfig.rootpath / ".pytest_cache" / "simmps")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Computer:
    """A computer without a GPU whose home holds the dataset `plays`."""
    folder = tmp_path_factory.mktemp("simmps")
    text = folder / "plays.txt"
    text.write_text("".join(piece.text for piece in builtin.pieces(size=24_000, seed=7)))
    computer = Computer(folder / "home", text)
    computer.silicon("prepare", str(text), "--name", "plays").ended()
    return computer


@pytest.fixture(scope="session")
def mac(plain: Computer, library: Path) -> Computer:
    """The same home on a computer with the pretend Apple GPU."""
    return Computer(plain.home, plain.text, library)


@pytest.fixture(scope="session")
def parts(mac: Computer) -> dict[str, Any]:
    """Answers of the pretend GPU below the command line."""
    return mac.python(str(CHILD / "parts.py")).ended().json()
