"""The whole road: every stage in turn, passed by when nothing changed, redone when something did, exact after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

import pytest

from siliconlm import road
from siliconlm.data import builtin, tasks
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Finished, Notice, Scored, Staged
from siliconlm.model.weights import read_model
from siliconlm.training.checkpoint import find_run

RECIPE = """
time = "1m"
[prepare]
sources = ["{text}"]
[train]
preset = "tiny"
profile = "none"
steps = 6
set = {{ {small} }}
[finetune]
profile = "none"
steps = 8
set = {{ "train.tokens_per_step" = 256, "train.save_every" = 2, "machine.threads" = 1 }}
[eval]
[export]
"""
SMALL = {"model.n_layer": 1, "model.n_embd": 32, "model.n_head": 1, "model.n_kv_head": 1, "model.n_ff": 64}
SMALL |= {"train.tokens_per_step": 256, "train.save_every": 2, "machine.threads": 1}
STAGES = ["prepare", "train", "finetune", "eval", "export"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tasks, "QUESTIONS", 60)
    return tmp_path / "home"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text, path = tmp_path / "plays.txt", tmp_path / "mini.toml"
    text.write_text("".join(piece.text for piece in builtin.pieces(size=6000, seed=7)))
    path.write_text(RECIPE.format(text=text, small=", ".join(f'"{name}" = {value}' for name, value in SMALL.items())))
    return path


def gone(recipe: Path, stop: Callable[[], str | None] = lambda: None) -> list[Event]:
    return list(road.travel(str(recipe), stop=stop))


def worked(events: list[Event]) -> list[str]:
    """The stages that were begun, not passed by."""
    return [event.stage for event in events if isinstance(event, Staged) and "running" in event.states.values()]


def weights(run: str) -> str:
    return find_run(run).newest()[0].sha256("model.safetensors")


def test_every_stage_in_turn(recipe: Path, home: Path) -> None:
    events = gone(recipe)
    assert worked(events) == STAGES
    *_, last = (event for event in events if isinstance(event, Staged))
    assert set(last.states.values()) == {"done"}
    _, about = find_run("mini-chat").config()
    assert about["from"] == "mini-base" and about["stage"] == "chat"
    scores = [event for event in events if isinstance(event, Scored)]
    assert sum(score.total for score in scores) == 6
    recorded = [json.loads(line) for line in (home / "runs" / "mini-chat" / "evals.jsonl").read_text().splitlines()]
    assert [line["event"] for line in recorded] == ["evaluated", *["scored"] * len(scores)]
    model, tokenizer = read_model(home / "models" / "mini")
    assert tokenizer.kind == "byte" and model.config.n_embd == 32
    assert "<|im_start|>" in (home / "models" / "mini" / "chat_template.jinja").read_text()


def test_a_finished_road_is_passed_by(recipe: Path) -> None:
    gone(recipe)
    before = weights("mini-chat")
    assert worked(gone(recipe)) == []
    assert weights("mini-chat") == before


def test_a_changed_text_is_named_and_all_that_hangs_on_it_is_made_again(recipe: Path, tmp_path: Path) -> None:
    gone(recipe)
    text = tmp_path / "plays.txt"
    text.write_text(text.read_text() + "One more line.\n" * 30)
    events = gone(recipe)
    assert worked(events) == STAGES
    told = [event.message for event in events if isinstance(event, Notice) and "made again" in event.message]
    assert told[:2] == ["prepare is made again: the text changed", "train is made again: the dataset changed"]
    assert find_run("mini-chat-2").config()[1]["from"] == "mini-base-2"
    assert find_run("mini-chat").newest(), "what was made before is still there"


def test_changed_facts_are_named(recipe: Path) -> None:
    gone(recipe)
    tasks.facts_path().write_text('[[fact]]\nquestions = ["Who?", "You?"]\nanswer = "Me."\n')
    events = gone(recipe)
    assert worked(events) == ["finetune", "eval", "export"]
    assert "finetune is made again: the conversations changed" in [
        event.message for event in events if isinstance(event, Notice)
    ]


@pytest.mark.parametrize("asked", [2, 9, 14])
def test_a_stopped_road_goes_on_to_the_same_weights(recipe: Path, tmp_path: Path, asked: int) -> None:
    number = count(1)
    events = gone(recipe, lambda: "SIGINT" if next(number) == asked else None)
    *_, last = (event for event in events if isinstance(event, Staged))
    assert "stopped" in last.states.values()
    assert not any(isinstance(event, Finished) and event.reason == "done" for event in events[-2:])
    gone(recipe)
    stopped = weights("mini-base"), weights("mini-chat")
    os.environ["SILICON_HOME"] = str(tmp_path / "straight")
    gone(recipe)
    assert (weights("mini-base"), weights("mini-chat")) == stopped


def killed_children(recipe: Path, moments: Iterator[float]) -> int:
    """Run the road as a child that is killed after so many seconds, again and again, then to its end."""
    program = "from siliconlm.data import tasks; tasks.QUESTIONS = 60; from siliconlm.cli.app import main; main()"
    command = [sys.executable, "-c", program, "run", str(recipe)]
    kills = 0
    for moment in moments:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return kills


@pytest.mark.slow
def test_ten_kills_end_with_the_same_weights(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.perf_counter()
    killed_children(recipe, iter(()))
    took = time.perf_counter() - begun
    straight = weights("mini-base"), weights("mini-chat")
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "killed"))
    random = Random(1)
    assert killed_children(recipe, (took * random.random() for _ in range(10))) >= 5
    assert (weights("mini-base"), weights("mini-chat")) == straight


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[eval]", "[evl]"), "evl"),
        (("steps = 6", "steps = 0"), "train.steps"),
        (("steps = 6", ""), "needs steps or a share"),
        (('time = "1m"', 'time = "soon"'), "time"),
        (('time = "1m"', ""), "time"),
        (('"model.n_layer"', '"model.n_layers"'), "unknown setting model.n_layers"),
    ],
)
def test_a_recipe_with_a_fault_is_refused_before_any_work(
    recipe: Path, home: Path, change: tuple[str, str], says: str
) -> None:
    recipe.write_text(recipe.read_text().replace(*change, 1))
    with pytest.raises(SiliconError, match=says):
        gone(recipe)
    assert not (home / "data").exists()


def test_recipes_that_come_with_it_are_sound() -> None:
    assert {"quick", "overnight"} <= road.recipes().keys()
    for name in road.recipes():
        assert road.read_recipe(name).stages[0] == "prepare"
    with pytest.raises(SiliconError, match="no recipe named qick") as caught:
        road.read_recipe("qick")
    assert "quick" in caught.value.fix
