"""The whole road from text to a model that talks, in stages. Stopped anywhere, the same command goes on.

    prepare -> train -> (mid) -> finetune -> eval -> export

A recipe is a TOML file. What a stage is made from (text, settings, the weights of the stage before) is hashed: a
finished stage whose inputs are the same is passed by, a changed input is named and the stage is made anew, under a new
name. `roads/<name>/road.json` in the home keeps what was made from what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from siliconlm import engine
from siliconlm.config import Duration, Layer, Section, check_names, moment, profile_folders, read_toml
from siliconlm.data.conversations import BUILTIN_CHAT
from siliconlm.data.dataset import NAME, datasets, open_dataset
from siliconlm.data.sources import BUILTIN
from siliconlm.data.tasks import read_facts
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Event, Finished, Notice, Staged
from siliconlm.files import held, home, write_file
from siliconlm.training.checkpoint import find_run, free_run_name, runs_folder

STAGES = ("prepare", "train", "mid", "finetune", "eval", "export")


class PrepareStage(Section):
    sources: tuple[str, ...] = (BUILTIN,)
    tokenizer: str = "byte"
    vocab_size: int = Field(4096, ge=1)
    val_fraction: float = Field(0.1, gt=0, lt=1)


class Budgeted(Section):
    """A stage that trains: for `steps`, or for a `share` of the road's time."""

    profile: str = "auto"
    steps: int | None = Field(None, ge=1)
    share: float | None = Field(None, gt=0, le=1)
    set: dict[str, Any] = Field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted names, also where TOML has made tables of them."""
        return {
            f"{name}.{key}" if key else name: inner
            for name, value in self.set.items()
            for key, inner in (value.items() if isinstance(value, dict) else [("", value)])
        }


class TrainStage(Budgeted):
    preset: str | None = None


class TuneStage(Budgeted):
    data: str = BUILTIN_CHAT
    template: str | None = None


class ModelStage(Section):
    """A stage without settings."""


class Recipe(Section):
    """`time` is what steps are sized for; asked for another, they are scaled."""

    time: Duration = Field(gt=0)
    prepare: PrepareStage
    train: TrainStage
    mid: TuneStage | None = None
    finetune: TuneStage | None = None
    eval: ModelStage | None = None
    export: ModelStage | None = None

    @property
    def stages(self) -> list[str]:
        return [name for name in STAGES if getattr(self, name) is not None]


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for folder in profile_folders() for path in sorted((folder / "recipes").glob("*.toml"))}


def read_recipe(word: str) -> Recipe:
    """A recipe by name, or a TOML file by path. SiliconError naming the file and the key that is wrong."""
    known = recipes()
    path = known.get(word, Path(word).expanduser())
    if word not in known and path.suffix != ".toml":
        fix = nearest(word, known) or f"There are: {', '.join(known)}; or give a TOML file."
        raise SiliconError(f"no recipe named {word}", fix=fix, kind="missing_input")
    try:
        recipe = Recipe(**read_toml(path))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        fix = nearest(key.rsplit(".", 1)[-1], _keys()) or "See profiles/recipes/quick.toml for an example."
        raise SiliconError(f"{key}: {problem['msg'].lower()}", where=str(path), fix=fix) from None
    for name in ("train", "mid", "finetune"):
        stage = getattr(recipe, name)
        if stage and (stage.steps is None) == (stage.share is None):
            raise SiliconError(f"[{name}] needs steps or a share of the time, one of them", where=str(path))
        if stage:
            check_names(stage.settings, f"{path} [{name}.set]")
    return recipe


def _keys() -> set[str]:
    models = (Recipe, PrepareStage, TrainStage, TuneStage)
    return {name for model in models for name in model.model_fields}


# --- the road --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Road:
    """A recipe on its way. `made` is what each stage made from what: {"inputs": {word: hash}, "made": name, "done"}."""

    name: str
    recipe: Recipe
    scale: float
    began: datetime
    seconds: float
    by_clock: bool
    asked: dict[str, Any]
    stop: Callable[[], str | None]
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return roads_folder() / self.name / "road.json"

    def write(self) -> None:
        facts = {"asked": self.asked, "began": self.began.isoformat(), "seconds": self.seconds, "made": self.made}
        write_file(self.path, json.dumps(facts, indent=2) + "\n")

    def flags(self, stage: str) -> Layer:
        """The budget of a stage that trains, and its settings."""
        settings: Budgeted = getattr(self.recipe, stage)
        values = settings.settings
        if settings.steps is not None:
            return Layer(f"recipe [{stage}]", {**values, "train.steps": max(1, round(settings.steps * self.scale))})
        assert settings.share is not None
        if not self.by_clock:
            return Layer(f"recipe [{stage}]", {**values, "train.time": settings.share * self.seconds})
        shares = [getattr(self.recipe, name).share or 0.0 for name in self.training(stage)]
        return Layer(
            f"recipe [{stage}]", {**values, "train.until": self.began + timedelta(seconds=sum(shares) * self.seconds)}
        )

    def training(self, last: str) -> list[str]:
        """The stages that train, up to one."""
        names = [name for name in ("train", "mid", "finetune") if getattr(self.recipe, name) is not None]
        return names[: names.index(last) + 1]


def roads_folder() -> Path:
    return home() / "roads"


def travel(
    word: str = "quick",
    name: str | None = None,
    time: float | None = None,
    until: str | None = None,
    data: tuple[str, ...] = (),
    stop: Callable[[], str | None] = lambda: None,
) -> Iterator[Event]:
    """Go a recipe's road, from where it was left. Yields a Staged as each stage begins and ends.

    `time` and `until` are for the whole road, `data` replaces the recipe's text.
    """
    recipe = read_recipe(word)
    if data:
        recipe = recipe.model_copy(update={"prepare": recipe.prepare.model_copy(update={"sources": data})})
    name = name or Path(word).stem
    if not NAME.fullmatch(name):
        raise SiliconError(f"{name!r} cannot be the name of a road", where="--name", fix="Type --name my-model.")
    road = _open(name, recipe, {"time": time, "until": until}, stop)
    with held(road.path.parent / ".lock", f"road {name}"):
        road.write()
        yield from _stages(road)


def _open(name: str, recipe: Recipe, asked: dict[str, Any], stop: Callable[[], str | None]) -> Road:
    """The road as it was left, or a new one. A time that is asked for again is the one it was begun with."""
    now, path = datetime.now(UTC), roads_folder() / name / "road.json"
    left = _read_state(path) if path.exists() else {}
    began, seconds = now, asked["time"] or recipe.time
    if asked["until"]:
        try:
            seconds = (moment(asked["until"], now) - now).total_seconds()
        except ValueError as error:
            raise SiliconError(f"--until {asked['until']}: {error}", fix="Type --until 07:00.") from None
    if left.get("asked") == asked:
        began, seconds = datetime.fromisoformat(left["began"]), left["seconds"]
    scale = seconds / recipe.time
    return Road(name, recipe, scale, began, seconds, bool(asked["until"]), asked, stop, left.get("made", {}))


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state["made"], dict) or not isinstance(state["seconds"], float | int):
            raise TypeError("entries of the wrong type")
        datetime.fromisoformat(state["began"])
        return state
    except (ValueError, KeyError, TypeError) as error:
        fix = f"Remove it to begin the road anew: rm {path}"
        raise SiliconError(f"damaged: {error}", where=str(path), fix=fix, kind="bad_data") from None


def _stages(road: Road) -> Iterator[Event]:
    waiting = list(road.recipe.stages)
    yield Staged(road.name, "", {stage: "waiting" for stage in waiting})
    states: dict[str, str] = dict.fromkeys(waiting, "waiting")
    for stage in waiting:
        inputs = INPUTS[stage](road)
        known = road.made.get(stage)
        if known and known["done"] and known["inputs"] == inputs and _is_there(stage, known["made"]):
            states[stage] = "done"
            yield Staged(road.name, stage, dict(states), f"{known['made']}, as it was made before")
            continue
        if known and known["inputs"] != inputs:
            changed = [word for word in inputs if known["inputs"].get(word) != inputs[word]]
            yield Notice(f"{stage} is made again: {' and '.join(changed)} changed")
            known = None
        states[stage] = "running"
        yield Staged(road.name, stage, dict(states))
        made = known["made"] if known else NAMES[stage](road)
        road.made[stage] = {"inputs": inputs, "made": made, "done": False}
        road.write()
        finished = yield from WORK[stage](road, made)
        if not finished:
            states[stage] = "stopped"
            yield Staged(road.name, stage, dict(states), f"silicon run {road.name} goes on")
            return
        road.made[stage]["done"] = True
        road.write()
        states[stage] = "done"
        yield Staged(road.name, stage, dict(states), made)


def _is_there(stage: str, made: str) -> bool:
    if stage == "prepare":
        return made in datasets()
    return Path(made).is_dir() if stage == "export" else (runs_folder() / made / "run.toml").is_file()


# --- stages ----------------------------------------------------------------------------------------------------------


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _settings(road: Road, stage: str) -> str:
    """What a stage is told, with its budget: of a deadline, what was asked for."""
    table = getattr(road.recipe, stage).model_dump()
    return _hash(table, road.asked if table.get("share") else road.scale if table.get("steps") else None)


def _text_state(words: tuple[str, ...]) -> str:
    """Size and time of every file of the sources; for words that are no files, the words."""
    facts: list[object] = []
    for word in words:
        path = Path(word).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
        facts.append(
            [word, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file())]
        )
    return _hash(facts)


def _before(road: Road, stage: str) -> str:
    """The run that a stage goes on from."""
    names = [name for name in ("train", "mid", "finetune") if name in road.made and name in road.recipe.stages]
    earlier = [name for name in names if STAGES.index(name) < STAGES.index(stage)]
    return str(road.made[earlier[-1]]["made"])


def _weights(road: Road, stage: str) -> str:
    checkpoint, _ = find_run(_before(road, stage)).newest()
    return checkpoint.sha256("model.safetensors")


def _conversations_state(road: Road, stage: str) -> str:
    data = getattr(road.recipe, stage).data
    return _hash(_text_state((data,)), read_facts() if data == BUILTIN_CHAT else None)


def _dataset_state(road: Road) -> str:
    with open_dataset(road.made["prepare"]["made"]) as dataset:
        return dataset.fingerprint


def _tuning_inputs(stage: str) -> Callable[[Road], dict[str, str]]:
    return lambda road: {
        "the conversations": _conversations_state(road, stage),
        "the base": _weights(road, stage),
        "its settings": _settings(road, stage),
    }


INPUTS: dict[str, Callable[[Road], dict[str, str]]] = {
    "prepare": lambda road: {
        "the text": _text_state(road.recipe.prepare.sources),
        "its settings": _settings(road, "prepare"),
    },
    "train": lambda road: {"the dataset": _dataset_state(road), "its settings": _settings(road, "train")},
    "mid": _tuning_inputs("mid"),
    "finetune": _tuning_inputs("finetune"),
    "eval": lambda road: {"the model": _weights(road, "eval")},
    "export": lambda road: {"the model": _weights(road, "export")},
}
NAMES: dict[str, Callable[[Road], str]] = {
    "prepare": lambda road: road.name,
    "train": lambda road: free_run_name(f"{road.name}-base"),
    "mid": lambda road: free_run_name(f"{road.name}-mid"),
    "finetune": lambda road: free_run_name(f"{road.name}-chat"),
    "eval": lambda road: _before(road, "eval"),
    "export": lambda road: str(home() / "models" / road.name),
}


def _prepare(road: Road, made: str) -> Generator[Event, None, bool]:
    stage = road.recipe.prepare
    sources = list(stage.sources)
    force = made in datasets()  # made from other text or in another way, by this road
    yield from engine.prepare(sources, made, stage.tokenizer, stage.vocab_size, stage.val_fraction, force)
    return road.stop() is None


def _train(road: Road, made: str) -> Generator[Event, None, bool]:
    stage = road.recipe.train
    request = engine.Request(road.made["prepare"]["made"], stage.preset, stage.profile, (), (road.flags("train"),))
    return (yield from _trained(engine.train(request, made, road.stop), road, made))


def _tune(name: str) -> Callable[[Road, str], Generator[Event, None, bool]]:
    def work(road: Road, made: str) -> Generator[Event, None, bool]:
        stage: TuneStage = getattr(road.recipe, name)
        request = engine.Request(None, None, stage.profile, (), (road.flags(name),))
        base = _before(road, name)
        fresh = engine.finetune(request, base, stage.data, stage.template, name=made, stop=road.stop)
        return (yield from _trained(fresh, road, made))

    return work


def _trained(fresh: Iterator[Event], road: Road, made: str) -> Generator[Event, None, bool]:
    """Begin a run, or go on with it where it is there; whether it was trained to its end."""
    finished = False
    begun = (runs_folder() / made / "run.toml").is_file()
    for event in engine.resume(made, road.stop) if begun else fresh:
        finished |= isinstance(event, Finished) and event.reason == "done"
        yield event
    return finished


def _eval(road: Road, made: str) -> Generator[Event, None, bool]:
    yield from engine.validate(made)
    return True


def _export(road: Road, made: str) -> Generator[Event, None, bool]:
    yield from engine.export_folder(_before(road, "export"), Path(made))
    return True


WORK: dict[str, Callable[[Road, str], Generator[Event, None, bool]]] = {
    "prepare": _prepare,
    "train": _train,
    "mid": _tune("mid"),
    "finetune": _tune("finetune"),
    "eval": _eval,
    "export": _export,
}
