from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from siliconlm.config import Layer, RunConfig, resolve
from siliconlm.data.dataset import Dataset, open_dataset
from siliconlm.data.prepare import prepare
from siliconlm.hardware.device import Device, open_device

TINY = {"model.n_layer": 2, "model.n_embd": 16, "model.n_head": 2, "model.n_kv_head": 1, "model.head_dim": 8}
TINY |= {"model.n_ff": 24, "model.vocab_size": 320, "model.context": 16, "train.tokens_per_step": 128}
TINY |= {"train.steps": 12, "machine.device": "cpu", "machine.threads": 1, "machine.micro_batch": 4}
VERSE = "".join(f"Line {n}: the {n * 7 % 11} ships sail on, and {n * n % 97} gulls cry “naïve”.\n" for n in range(70))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "home"


@pytest.fixture
def config() -> Callable[..., RunConfig]:
    """The smallest run; settings by dotted name, written with two underscores for the dot, lie on top."""

    def make(**changes: Any) -> RunConfig:
        values = {name.replace("__", "."): value for name, value in changes.items()}
        return resolve(Layer("test", TINY), Layer("this test", values))

    return make


@pytest.fixture
def device() -> Device:
    return open_device(resolve(Layer("test", TINY)).machine)


@pytest.fixture
def dataset(home: Path, tmp_path: Path) -> Iterator[Dataset]:
    """One small document in bytes."""
    (tmp_path / "verse.txt").write_text(VERSE, encoding="utf-8")
    list(prepare([str(tmp_path / "verse.txt")], "verse"))
    with open_dataset("verse") as opened:
        yield opened
