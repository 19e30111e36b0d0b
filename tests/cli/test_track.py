"""Training's numbers in other programs' files, read back with those programs' own readers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from siliconlm import events as ev
from siliconlm.cli import track
from siliconlm.errors import SiliconError
from siliconlm.training.checkpoint import RunFolder

if TYPE_CHECKING:
    from .conftest import Silicon, Trained


def logged(folder: Path, kind: str) -> list[dict[str, float]]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == kind]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard shows: steps and values by name, without what a restart took back."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = reading.EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    return {tag: [(item.step, item.value) for item in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_the_run_also_after_a_resume(silicon: Silicon, own: Trained) -> None:
    pytest.importorskip("tensorboard")
    words = ["train", "--data", "plays", "--preset", own.preset, "--name", "shown", "--track", "tensorboard"]
    assert silicon(*words).code == 0
    run = RunFolder(own.home / "runs" / "shown")
    losses = [(record["step"], pytest.approx(record["loss"])) for record in logged(run.path, "step")]
    assert scalars(run.path)["train/loss"] == losses and len(losses) == 8
    assert scalars(run.path)["val/bits_per_byte"][-1] == (
        8,
        pytest.approx(logged(run.path, "evaluated")[-1]["val_bpb"]),
    )
    for file in own.checkpoints("shown")[0].iterdir():
        file.unlink()  # so that steps 5 to 8 are taken back
    assert silicon("resume", "shown", "--track", "tensorboard").code == 0
    assert [step for step, _ in scalars(run.path)["train/loss"]] == list(range(1, 9))
    assert {"train/tokens_per_s", "train/memory", "train/learning_rate"} <= scalars(run.path).keys()


def test_numbers_of_events() -> None:
    assert track.scalars(ev.Scored(3, "sums", 9, 12, 1.0)) == {"task/sums": 0.75}
    assert track.scalars(ev.Evaluated(3, 2.0, 2.9, 100, True)) == {"val/loss": 2.0, "val/bits_per_byte": 2.9}
    assert track.scalars(ev.Step(3, 192, 2.5, 0.5, 0.1))["train/loss"] == 2.5
    assert track.scalars(ev.Saved(3, "", 1, 0.1)) == {} and track.scalars(ev.Notice("hm")) == {}


def test_a_backend_that_is_unknown_or_missing_is_told_before_any_work(
    silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--data", "plays", "--preset", own.preset, "--name", "none"]
    done = silicon(*words, "--track", "tensorbord")
    assert done.code == 1 and "no such backend" in done.err and "Did you mean tensorboard?" in done.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = silicon(*words, "--track", "wandb")
    assert done.code == 1 and done.err == (
        "error: --track wandb: wandb is not installed\n  Type pip install 'siliconlm[wandb]'.\n"
    )
    assert not (own.home / "runs" / "none").exists()


def test_a_backend_that_fails_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    @contextmanager
    def full(run: str, folder: Path, step: int) -> Iterator[track.Log]:
        def log(numbers: Mapping[str, float], at: int) -> None:
            if at == 3:
                raise OSError(28, "No space left on device")
            taken.append(at)

        yield log

    monkeypatch.setitem(track.BACKENDS, "full", full)
    started = ev.Started("run", str(tmp_path), "plays", "cpu", 1, 1, 1, 64, 16, "5 steps")
    told = [started, *(ev.Step(step, 64 * step, 2.0, 1.0, 1.0) for step in range(1, 6))]
    passed = list(track.tracked(told, "full"))
    assert [event for event in passed if not isinstance(event, ev.Notice)] == told and taken == [1, 2]
    [notice] = [event for event in passed if isinstance(event, ev.Notice)]
    assert notice.level == "warning" and "No space left on device" in notice.message


def test_a_resumed_run_is_known_again_and_another_of_its_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "started", "at": 1.0}\n{"event": "step"}\n')
    first = track.mark(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "started", "at": 1.0}\n{"event": "other"}\n')
    assert track.mark(tmp_path) == first
    (tmp_path / "log.jsonl").write_text('{"event": "started", "at": 2.0}\n')
    assert track.mark(tmp_path) != first


def test_wandb_offline(silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(own.home / "wandb-cache"))
    wandb = pytest.importorskip("wandb")
    words = ["train", "--data", "plays", "--preset", own.preset, "--name", "shown", "--track", "wandb", "--json"]
    done = silicon(*words)
    assert done.code == 0 and all(json.loads(line)["event"] for line in done.out.splitlines())
    wandb.teardown()  # as at the end of the process: then all is written
    [kept] = (own.home / "runs" / "shown" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in kept.read_bytes()


def test_wandb_without_a_login_is_told(silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(SiliconError, match="No API key configured"),
        track.to_wandb("run", own.home / "runs" / "whole", 0),
    ):
        pass


def test_trackio(silicon: Silicon, own: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    words = ["train", "--data", "plays", "--preset", own.preset, "--name", "shown", "--track", "trackio", "--json"]
    done = silicon(*words)
    assert done.code == 0 and all(json.loads(line)["event"] for line in done.out.splitlines())
    with closing(sqlite3.connect(tmp_path / "trackio" / "siliconlm.db")) as database:
        told = [(step, json.loads(numbers)) for step, numbers in database.execute("SELECT step, metrics FROM metrics")]
    losses = {step: numbers["train/loss"] for step, numbers in told if "train/loss" in numbers}
    assert losses == {record["step"]: record["loss"] for record in logged(own.home / "runs" / "shown", "step")}
