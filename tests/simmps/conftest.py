"""A pretend Apple GPU (simmps.cpp) for Linux: real autograd, autocast and torch.mps, in child processes.

It lacks the operators that Apple GPUs lack, its memory has an end, and it refuses float64 and mixed devices. It says
nothing about Metal's numbers. Registering it is for good, so no test process loads it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
CHILD = HERE / "child"
RECOMMENDED = 2 << 30  # bytes, unless a test says otherwise


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
def mac(plain: Any, library: Path) -> Any:
    """The same home on a computer with the pretend Apple GPU."""
    ops = HERE / "ops" / "mps_ops_2.13.txt"
    added = {"SIMMPS_LIB": str(library), "SIMMPS_OPS": str(ops), "SIMMPS_RECOMMENDED": str(RECOMMENDED)}
    return replace(plain, added={**plain.added, **added, "PYTHONPATH": str(CHILD)})


@pytest.fixture(scope="session")
def parts(mac: Any) -> dict[str, Any]:
    """Answers of the pretend GPU below the command line."""
    return mac.python(str(CHILD / "parts.py")).ended().json()
