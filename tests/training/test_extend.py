"""Deadlines and second budgets: what `--until` and `--extend` do to a run, by its run.toml and its log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from siliconlm import engine
from siliconlm.config import Layer, write_run
from siliconlm.data.dataset import Dataset
from siliconlm.data.prepare import prepare
from siliconlm.errors import SiliconError
from siliconlm.events import Evaluated, Event, Finished, Notice, Resumed, Started, Step
from siliconlm.training.checkpoint import RunFolder, find_run, read_log
from siliconlm.training.loop import Clock
from siliconlm.training.schedule import Budget

SHAPE = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "n_ff": 24, "context": 16}
WORDS = [f"model.{name}={value}" for name, value in SHAPE.items()]
WORDS += ["train.tokens_per_step=128", "train.warmup=0.3", "train.decay=0.4", "train.eval_tokens=256"]
WORDS += ["machine.micro_batch=4", "machine.threads=1", "machine.device=cpu"]
HOUR = timedelta(hours=1)
Stop = Callable[[], str | None]


@pytest.fixture(autouse=True)
def data(dataset: Dataset) -> Dataset:
    return dataset


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose run `run` has done its 12 steps; made once, to be copied."""
    folder = tmp_path_factory.mktemp("extend")
    text = "".join(f"{n}: the {n * 7 % 11} ships sail on, and {n * n % 97} gulls cry.\n" for n in range(70))
    (folder / "verse.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SILICON_HOME", str(folder / "home"))
        list(prepare([str(folder / "verse.txt")], "verse"))
        train({"train.steps": 12})
    return folder / "home"


@pytest.fixture
def finished(straight: Path, home: Path) -> RunFolder:
    shutil.rmtree(home)
    shutil.copytree(straight, home)
    return find_run("run")


def train(budget: dict[str, Any], stop: Stop = lambda: None) -> list[Event]:
    request = engine.Request("verse", profile="none", assignments=tuple(WORDS), flags=(Layer("--budget", budget),))
    return list(engine.train(request, "run", stop))


def resume(extend: float | None = None, stop: Stop = lambda: None) -> list[Event]:
    return list(engine.resume("run", stop, extend=extend))


def after(steps: int) -> Stop:
    """A signal that comes after so many steps."""
    asked = count(1)
    return lambda: "SIGINT" if next(asked) >= steps else None


def of(kind: type[Any], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def notices(events: list[Event]) -> str:
    return "\n".join(notice.message for notice in of(Notice, events))


def settings(run: RunFolder) -> dict[str, Any]:
    """The budget of a run as its run.toml has it."""
    config, about = run.config()
    budget = config.train.model_dump(include={"steps", "tokens", "time", "until"}, exclude_none=True)
    return budget | {name: about[name] for name in ("extended_at", "deadline") if name in about}


# --- more time -------------------------------------------------------------------------------------------------------


def test_a_finished_run_warms_up_decays_and_ends_better(finished: RunFolder) -> None:
    before = next(event for event in reversed(read_log(finished)) if event["event"] == "evaluated")
    used = finished.newest()[0].state()["seconds"]
    events = resume(extend=2.0)
    assert settings(finished) == {"time": used + 2.0, "extended_at": used}
    assert "extended by 2s: the learning rate warms up" in notices(events)
    assert of(Started, events)[0].budget.endswith(" + 2 s") and of(Resumed, events)[0].step == 12
    steps = of(Step, events)
    assert steps[0].step == 13 and steps[0].tokens == 13 * 128, "it goes on from the final checkpoint"
    rates = [step.lr for step in steps]
    top = rates.index(1.0)
    assert rates[0] < 0.3 and rates[:top] == sorted(rates[:top]), "it warms up"
    assert rates[-1] < 0.3 and set(rates[top : rates.count(1.0)]) <= {1.0}, "holds, and decays"
    last = of(Finished, events)[0]
    assert last.reason == "done" and last.complete and last.val_loss < before["val_loss"] - 0.1
    assert of(Evaluated, events)[-1].val_loss == last.val_loss
    row = next(row for row in engine.runs() if row["run"] == "run")
    assert (row["state"], row["budget"], row["step"]) == ("done", of(Started, events)[0].budget, last.step)
    assert "has used its budget" in notices(resume())


def test_an_extension_that_is_stopped_goes_on_like_any_run(finished: RunFolder) -> None:
    assert of(Finished, resume(extend=1.5, stop=after(4)))[0].reason == "SIGINT"
    written = (finished.path / "run.toml").read_text()
    assert finished.newest()[0].step == 16
    events = resume()
    assert of(Step, events)[0].step == 17 and of(Finished, events)[0].reason == "done"
    assert (finished.path / "run.toml").read_text() == written


def test_a_run_can_be_extended_twice(finished: RunFolder) -> None:
    resume(extend=0.5)
    first = settings(finished)
    used = finished.newest()[0].state()["seconds"]
    assert used >= first["time"]
    resume(extend=0.75)
    assert settings(finished) == {"time": used + 0.75, "extended_at": used}


def test_the_time_of_a_stopped_run_grows() -> None:
    train({"train.time": 600}, after(3))
    run = find_run("run")
    events = resume(extend=300.0, stop=after(3))
    assert settings(run) == {"time": 900.0} and "extended by 5m: now 15m" in notices(events)
    assert of(Step, events)[0].step == 4 and run.config()[0].sources["train.time"] == "--extend"


def test_steps_that_are_left_are_done_first() -> None:
    train({"train.steps": 12}, after(3))
    run = find_run("run")
    before = (run.path / "run.toml").read_bytes()
    with pytest.raises(SiliconError, match="only 3 of 12 steps are done") as caught:
        resume(extend=60.0)
    assert "silicon resume" in caught.value.fix and (run.path / "run.toml").read_bytes() == before


def test_a_run_that_cannot_go_on_is_not_extended(finished: RunFolder) -> None:
    before = (finished.path / "run.toml").read_bytes()
    weights = finished.newest()[0].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SiliconError, match="no checkpoint of run is whole"):
        resume(extend=60.0)
    assert (finished.path / "run.toml").read_bytes() == before


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_run_until_a_moment_ends_by_it_and_is_done() -> None:
    deadline = datetime.now(UTC) + timedelta(seconds=3)
    events = train({"train.until": deadline})
    run, last = find_run("run"), of(Finished, events)[0]
    budget = settings(run)
    assert last.reason == "done" and budget.keys() == {"time", "deadline"}
    assert budget["deadline"] == deadline and 0 < budget["time"] < 3
    assert of(Started, events)[0].budget.endswith(f" until {deadline:%Y-%m-%d %H:%M}")
    assert of(Step, events)[-1].lr < 0.3 and run.config()[0].sources["train.time"] == "--budget"
    again = resume()
    assert "has used its budget" in notices(again) and not of(Step, again) and settings(run) == budget


def test_the_clock_on_the_wall_counts_until_a_deadline() -> None:
    """Of a budget of two hours one is used when an hour is left, however long this process was awake."""
    clock = Clock(Budget(None, 7200.0, deadline=datetime.now(UTC) + HOUR), 5.0, lambda: 0.0, 0.0)
    assert clock.seconds == pytest.approx(3600, abs=60)
    assert Clock(Budget(None, 7200.0), 5.0, lambda: 0.0, 0.0).seconds == 5


def test_a_stopped_run_takes_the_time_that_is_left_until_its_deadline() -> None:
    deadline = datetime.now(UTC) + 2 * HOUR
    train({"train.until": deadline}, after(3))
    run = find_run("run")
    used = run.newest()[0].state()["seconds"]
    config, about = run.config()
    write_run(run.path / "run.toml", config.with_time("--until", 100_000.0), about)
    began = time.time()
    events = resume(stop=after(3))
    ended = time.time()
    budget = settings(run)
    assert deadline.timestamp() - ended < budget["time"] - used < deadline.timestamp() - began
    assert budget["deadline"] == deadline and "left until" in notices(events)


def test_a_stopped_run_whose_deadline_is_past_has_the_time_that_was_left() -> None:
    train({"train.until": datetime.now(UTC) + HOUR}, after(3))
    run = find_run("run")
    config, about = run.config()
    write_run(run.path / "run.toml", config, about | {"deadline": datetime.now(UTC) - HOUR})
    events = resume(stop=after(3))
    assert settings(run) == {"time": config.train.time}
    (warning,) = (notice for notice in of(Notice, events) if notice.level == "warning")
    assert "is past" in warning.message and "left of the budget" in warning.message
    assert len(of(Step, events)) == 3


def test_a_moment_that_comes_before_training_is_refused(home: Path) -> None:
    with pytest.raises(SiliconError, match="came before training could begin") as caught:
        train({"train.until": datetime.now(UTC)})
    assert caught.value.where == "--budget" and not (home / "runs").exists()


def test_the_settings_of_an_extended_run_begin_a_new_one_plainly(finished: RunFolder) -> None:
    resume(extend=0.5)
    profile = str(finished.path / "run.toml")
    request = engine.Request("verse", profile=profile, flags=(Layer("--steps", {"train.steps": 2}),))
    list(engine.train(request, "again"))
    assert settings(find_run("again")) == {"steps": 2}
