"""A run folder read into plain numbers: what it is, how it went, what it came from. Nothing but files is asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from siliconlm.cli.words import clock, few, number
from siliconlm.config import RunConfig, known_settings
from siliconlm.data.dataset import open_dataset
from siliconlm.errors import SiliconError
from siliconlm.training.checkpoint import RunFolder, find_run, read_checkpoint, read_evals, read_log, runs_folder

Record = dict[str, Any]
Log = Mapping[str, Sequence[Record]]  # events by kind


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    value: Any
    default: Any
    source: str

    @property
    def changed(self) -> bool:
        return bool(self.value != self.default)


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over training, with the tokens and the seconds of training at each."""

    tokens: list[int]
    seconds: list[float]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation: nats per token and bits per byte on `scored` validation tokens, after `tokens` of training."""

    step: int
    tokens: int
    seconds: float
    val_loss: float
    val_bpb: float
    scored: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Session:
    """From one start of training to its end. Times of day in seconds since 1970; `ended_by` "done", "running",
    "interrupted" (nothing says how it ended) or the name of a signal."""

    began: float
    ended: float
    first_step: int
    last_step: int
    ended_by: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint on disk, of `bytes`; `damage` says why it cannot be read."""

    step: int
    bytes: int
    val_loss: float | None
    best: bool = False
    damage: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the chain that led to a model, with its last evaluation, the one `before` it, and its last score on
    each task. `found` is False for what is no run here, of which `kind` says what it is."""

    run: str
    kind: str
    dataset: str = ""
    tokens: int = 0
    before: Record | None = None
    after: Record | None = None
    scores: tuple[Record, ...] = ()
    found: bool = True

    @property
    def words(self) -> str:
        """What it was and how it ended, in a line."""
        if not self.found:
            return self.kind
        words = f"{self.kind} on {self.dataset}, {number(self.tokens)} tokens"
        before = f"{self.before['val_loss']:.4f} -> " if self.before else ""
        words += f", val_loss {before}{self.after['val_loss']:.4f}" if self.after else ", not evaluated"
        return words + "".join(f", {score['task']} {score['correct']} of {score['total']}" for score in self.scores)


@dataclass(frozen=True, slots=True)
class Floor:
    """Nats per character of the validation text: the model's, and the least that any model can have on average for
    this text and, in the long run, for the grammar that made it. `per_token` is the text's in nats per token."""

    reached: float
    text: float
    grammar: float
    per_token: float
    complete: bool


@dataclass(frozen=True, slots=True)
class Report:
    """A run as plain numbers. `tokens` and `seconds` are of training, over all sessions, without what a resume took
    back; memory and sizes in bytes. `data` is the fingerprint of its dataset, `card` that dataset's, where it is still
    the same; `started` the last record of a start of training. `scores` are on our own tasks, `measured` on those of
    lm-evaluation-harness. Records are as in the log."""

    run: str
    path: str
    state: str
    shape: str
    data: str
    versions: dict[str, str]
    started: Record
    card: Record | None
    step: int
    tokens: int
    seconds: float
    tokens_per_s: float
    peak_memory: int
    settings: list[Setting]
    loss: Curve
    learning_rate: Curve
    speed: Curve
    memory: Curve
    evaluations: list[Evaluation]
    stages: list[Stage]
    scores: list[Record]
    measured: list[Record]
    examples: list[Record]
    floor: Floor | None
    warnings: list[Record]
    sessions: list[Session]
    checkpoints: list[Kept]

    def as_json(self) -> Record:
        """All but the curves, which are in the run's log."""
        return {name: value for name, value in asdict(self).items() if not isinstance(getattr(self, name), Curve)}

    @property
    def sentence(self) -> str:
        """What the run is."""
        words = f"A model of {number(self.parameters)} parameters ({self.shape})"
        words += f" trained on {self.started.get('dataset', 'nothing yet')}"
        words += f" for {clock(self.seconds)}: {number(self.tokens)} tokens in {self.step:,} steps"
        if self.card:
            words += f", {few(self.tokens / self.card['splits']['train']['tokens'])} passes over the text"
        if self.last is None:
            return words + "; it was not evaluated yet."
        words += f"; validation loss {self.last.val_loss:.4f} nats per token, {self.last.val_bpb:.4f} bits per byte"
        return words + ("." if self.last.complete else " on a part of the validation split.")

    @property
    def state_words(self) -> str:
        """`state`, with a signal's name made clear."""
        return f"stopped by {self.state}" if self.state.isupper() else self.state

    @property
    def is_chat(self) -> bool:
        """Whether it was taught to talk."""
        return self.stages[-1].kind == "chat"

    @property
    def last(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def parameters(self) -> int:
        return int(self.started.get("parameters", 0))


def read_report(name: str | None) -> Report:
    """The report of a run by name or path; of the latest when no name is given. SiliconError when there is none."""
    run = find_run(name)
    config, about = run.config()
    events = read_log(run)
    log = by_kind([*events, *read_evals(run)])
    card = read_card(about)
    sittings = sessions(events, run.in_use())
    progress, steps = log["progress"], log["step"]
    evaluations = list(evaluated(log))
    rates = [record["tokens_per_s"] for record in progress]
    return Report(
        run=run.name,
        path=str(run.path),
        state=sittings[-1].ended_by if sittings else "not begun",
        shape=shape(config),
        data=str(about.get("data", "")),
        versions=about.get("versions", {}),
        started=log["started"][-1] if log["started"] else {},
        card=card,
        step=max((record.get("step", 0) for record in events), default=0),
        tokens=max((record["tokens"] for record in (*steps[-1:], *log["finished"][-1:])), default=0),
        seconds=max((record["seconds"] for record in (*progress[-1:], *log["finished"][-1:])), default=0.0),
        tokens_per_s=float(np.median(rates)) if rates else 0.0,
        peak_memory=max((record["memory"] for record in progress), default=0),
        settings=list(settings(config)),
        loss=curve(log, steps, "loss"),
        learning_rate=curve(log, steps, "lr"),
        speed=curve(log, progress, "tokens_per_s"),
        memory=curve(log, progress, "memory"),
        evaluations=evaluations,
        stages=lineage(run),
        scores=by_step(log["scored"]),
        measured=by_step(log["measured"]),
        examples=last_examples(log["example"]),
        floor=floor(card, evaluations[-1]) if card and evaluations else None,
        warnings=[record for record in log["notice"] if record["level"] == "warning"],
        sessions=sittings,
        checkpoints=list(checkpoints(run)),
    )


def by_kind(events: Sequence[Record]) -> Log:
    kinds: defaultdict[str, list[Record]] = defaultdict(list)
    for record in events:
        kinds[record["event"]].append(record)
    return kinds


def shape(config: RunConfig) -> str:
    model = config.model
    return f"{model.n_layer} layers x {model.n_embd}, context {model.context:,}"


def settings(config: RunConfig) -> Iterator[Setting]:
    values = config.model_dump(mode="json")
    for name, field in known_settings().items():
        section, key = name.split(".")
        yield Setting(name, values[section][key], field.default, config.sources.get(name, "default"))


def read_card(about: Record) -> Record | None:
    """The card of the dataset that a run was trained on; None where it is gone or has become another."""
    try:
        with open_dataset(str(Path(about["dataset"]))) as dataset:
            return dataset.card if dataset.fingerprint == about["data"] else None
    except (SiliconError, KeyError):
        return None


# --- how it went -----------------------------------------------------------------------------------------------------


def curve(log: Log, records: Sequence[Record], name: str) -> Curve:
    tokens = [record["tokens"] for record in records]
    return Curve(tokens, seconds_at(log, tokens), [record[name] for record in records])


def seconds_at(log: Log, tokens: Sequence[int]) -> list[float]:
    """Seconds of training after so many tokens: known where progress was told, a straight line between."""
    told = log["progress"]
    known = [0, *(record["tokens"] for record in told)], [0.0, *(record["seconds"] for record in told)]
    return [float(value) for value in np.interp(tokens, *known)]


def evaluated(log: Log) -> Iterator[Evaluation]:
    """In the order of steps: those after training may be of any checkpoint."""
    tokens_at = {record["step"]: record["tokens"] for record in log["step"]}
    records = by_step(log["evaluated"])
    tokens = [tokens_at.get(record["step"], 0) for record in records]
    for record, after, seconds in zip(records, tokens, seconds_at(log, tokens), strict=True):
        losses = record["val_loss"], record["val_bpb"]
        yield Evaluation(record["step"], after, seconds, *losses, record["tokens"], record["complete"])


def by_step(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: int(record["step"]))


def sessions(events: Sequence[Record], running: bool) -> list[Session]:
    """Cut where training started. `running` says whether a process still writes the run."""
    starts = [index for index, record in enumerate(events) if record["event"] == "started"]
    found = [session(events[start:end]) for start, end in pairwise([*starts, len(events)])]
    if found and running:
        found[-1] = replace(found[-1], ended_by="running")
    return found


def session(events: Sequence[Record]) -> Session:
    log = by_kind(events)
    first = log["resumed"][0]["step"] if log["resumed"] else 0
    last = max(first, *(record.get("step", 0) for record in events))
    reason = log["finished"][-1]["reason"] if log["finished"] else "interrupted"
    return Session(events[0]["at"], events[-1]["at"], first, last, reason)


def checkpoints(run: RunFolder) -> Iterator[Kept]:
    """Newest first."""
    best = run.best()
    for path in run.checkpoints():
        try:
            manifest = read_checkpoint(path).manifest
        except SiliconError as error:
            yield Kept(int(path.name.removeprefix("step-")), 0, None, damage=error.what)
            continue
        size = sum(facts["bytes"] for facts in manifest["files"].values())
        yield Kept(manifest["step"], size, manifest["val_loss"], best is not None and best.path == path)


def last_examples(records: Sequence[Record]) -> list[Record]:
    """Those of the last step, each prompt once: a run that was opened again writes the same ones anew."""
    step = records[-1]["step"] if records else 0
    return list({record["prompt"]: record for record in records if record["step"] == step}.values())


def floor(card: Record, last: Evaluation) -> Floor | None:
    """How far a model is from the entropy of its text; None where that is not known.

    Bits per byte are turned into nats per character, which no tokenizer changes.
    """
    known, split = card.get("entropy_floor"), card["splits"]["val"]
    if known is None:
        return None
    reached = last.val_bpb * log(2) * split["bytes"] / split["characters"]
    per_token = known["val"] * split["characters"] / (split["tokens"] - split["documents"])
    return Floor(reached, known["val"], known["grammar"], per_token, last.complete)


# --- what it came from -----------------------------------------------------------------------------------------------


def lineage(run: RunFolder, later: frozenset[Path] = frozenset()) -> list[Stage]:
    """The stages that led to a run, the first one first, the run itself last."""
    config, about = run.config()
    own = stage(run, config, about)
    if "from" not in about:
        return [own]
    before, later = parent(about), later | {run.path.resolve()}
    if before is None or before.path.resolve() in later:
        kind = "a model folder" if Path(about.get("from_path", "")).is_dir() else "no longer there"
        return [Stage(str(about["from"]), kind, found=False), own]
    return [*lineage(before, later), own]


def parent(about: Record) -> RunFolder | None:
    """The run that another one began with, by its folder (or that of a checkpoint in it), else by its name."""
    places = [runs_folder() / str(about["from"])]
    if given := about.get("from_path"):
        places = [Path(given), *Path(given).parents[1:2], *places]
    for place in places:
        if (place / "run.toml").is_file():
            return RunFolder(place)
    return None


def stage(run: RunFolder, config: RunConfig, about: Record) -> Stage:
    log = by_kind([*read_log(run), *read_evals(run)])
    losses = by_step(log["evaluated"])
    return Stage(
        run.name,
        str(about.get("stage", "pretraining")),
        config.data.name,
        max((record["tokens"] for record in log["step"]), default=0),
        next((record for record in losses if record["step"] == 0), None),
        losses[-1] if losses else None,
        tuple({record["task"]: record for record in by_step(log["scored"])}.values()),
    )
