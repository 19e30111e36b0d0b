"""The command line in this process (importing torch once), or in a child where the process itself matters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from siliconlm import engine
from siliconlm.cli.app import main
from siliconlm.config import Layer
from siliconlm.data import builtin

TEXT = "".join(piece.text for piece in builtin.pieces(size=12_000, seed=7))
MINI = """
[model]
n_layer = 1
n_embd = 32
n_head = 1
n_kv_head = 1
head_dim = 32
n_ff = 64
context = 32

[train]
steps = 8
tokens_per_step = 64
save_every = 4

[machine]
micro_batch = 2
threads = 1
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def told(self) -> str:
        """stderr as one line of single spaces, however it was wrapped."""
        return " ".join(self.err.split())

    def mentions(self, text: object) -> bool:
        """Whether stderr holds a text, though lines may be wrapped within it."""
        return "".join(str(text).split()) in "".join(self.err.split())


Silicon = Callable[..., Result]


@dataclass(frozen=True, slots=True)
class Trained:
    """A home with the dataset `plays` and the runs `whole` (8 steps) and `cut` (stopped by a signal at step 6)."""

    home: Path
    text: Path
    preset: Path

    def checkpoints(self, run: str) -> list[Path]:
        """Newest first."""
        return sorted((self.home / "runs" / run / "checkpoints").glob("step-*"), reverse=True)

    def files(self) -> dict[str, bytes]:
        """Every file in the home but locks and what evaluations noted, by its path."""
        left_out = (".lock", "evals.jsonl")
        found = (path for path in self.home.rglob("*") if path.is_file() and path.name not in left_out)
        return {str(path.relative_to(self.home)): path.read_bytes() for path in found}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and none of the environment that would change what is printed."""
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def silicon(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Silicon:
    """Run a command in this process."""

    def run(*words: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["silicon", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, out, err)

    return run


@pytest.fixture
def child() -> Silicon:
    """Run a command as `python -m siliconlm`; keywords go to subprocess.run."""

    def run(*words: str | Path, **options: Any) -> Result:
        command = [sys.executable, "-W", "error", "-m", "siliconlm", *map(str, words)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        done = subprocess.run(command, text=True, timeout=120, **streams)
        return Result(done.returncode, done.stdout or "", done.stderr or "")

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Made once. Only for tests that read; `own` is a copy to change."""
    folder = tmp_path_factory.mktemp("made")
    trained = Trained(folder / "home", folder / "plays.txt", folder / "mini.toml")
    trained.text.write_text(TEXT)
    trained.preset.write_text(MINI)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SILICON_HOME", str(trained.home))
        list(engine.prepare([str(trained.text)], "plays", "char"))
        request = engine.Request("plays", str(trained.preset), flags=(Layer("--seed", {"train.seed": 3}),))
        asked = count(1)
        list(engine.train(request, "cut", lambda: "SIGINT" if next(asked) == 6 else None))
        list(engine.train(request, "whole"))
    before = trained.files()
    yield trained
    assert trained.files() == before, "a test changed the shared home"


@pytest.fixture
def trained(made: Trained, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The shared home, to read."""
    monkeypatch.setenv("SILICON_HOME", str(made.home))
    return made


@pytest.fixture
def own(made: Trained, home: Path) -> Trained:
    """A copy of the shared home, to damage."""
    shutil.copytree(made.home, home, ignore=shutil.ignore_patterns("evals.jsonl"))
    os.utime(home / "runs" / "whole" / "log.jsonl")
    return Trained(home, made.text, made.preset)
