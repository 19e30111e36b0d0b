"""Training's numbers for other programs' dashboards: one more reader of the events, a function for each backend."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from siliconlm import events as ev
from siliconlm.errors import SiliconError, nearest

PROJECT = "siliconlm"
Log = Callable[[Mapping[str, float], int], None]  # scalars by name, and their step


def scalars(event: ev.Event) -> dict[str, float]:
    """The numbers of an event worth a curve; none of most."""
    if isinstance(event, ev.Step):
        return {"train/loss": event.loss, "train/grad_norm": event.grad_norm, "train/learning_rate": event.lr}
    if isinstance(event, ev.Progress):
        told = {"tokens": event.tokens, "tokens_per_s": event.tokens_per_s, "memory": event.memory}
        return {f"train/{name}": float(value) for name, value in told.items()}
    if isinstance(event, ev.Evaluated):
        return {"val/loss": event.val_loss, "val/bits_per_byte": event.val_bpb}
    if isinstance(event, ev.Scored):
        return {f"task/{event.task}": event.correct / max(1, event.total)}
    return {}


def tracked(events: Iterable[ev.Event], name: str) -> Iterator[ev.Event]:
    """Pass events on, and their numbers to a backend, which is opened as training begins and closed at its end."""
    started: ev.Started | None = None
    log: Log | None = None
    with ExitStack() as stack:
        for event in events:
            if isinstance(event, ev.Started):
                started = event
            elif started and log is None:  # what follows says whether an earlier step is gone on from
                step = event.step if isinstance(event, ev.Resumed) else 0
                log = stack.enter_context(BACKENDS[name](started.run, Path(started.path), step))
            if log and (numbers := scalars(event)):
                try:
                    log(numbers, event.step)  # type: ignore[attr-defined]  # every event with numbers has a step
                except OSError as error:  # a full disk here must not end the training
                    log = ignore
                    yield ev.Notice(f"{name} gets no more numbers: {error}", "warning")
            yield event


def ignore(numbers: Mapping[str, float], step: int) -> None:
    """In place of a backend that has failed."""


def check_backend(name: str) -> str:
    """The name of a backend that is there. SiliconError for one that is not known or not installed."""
    if name not in BACKENDS:
        fix = nearest(name, BACKENDS) or f"There are: {', '.join(BACKENDS)}."
        raise SiliconError(f"--track {name}: no such backend", fix=fix, kind="usage")
    if importlib.util.find_spec(name) is None:
        fix = f"Type pip install 'siliconlm[{name}]'."
        raise SiliconError(f"--track {name}: {name} is not installed", fix=fix, kind="bad_environment")
    return name


@contextmanager
def to_tensorboard(run: str, folder: Path, step: int) -> Iterator[Log]:
    """Event files in the run's folder. What earlier ones hold of steps after `step` is taken back."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder / "tensorboard"))
    if step:
        begun = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=begun))

    def log(numbers: Mapping[str, float], at: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        writer.add_event(Event(wall_time=time.time(), step=at, summary=Summary(value=values)))

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def to_wandb(run: str, folder: Path, step: int) -> Iterator[Log]:
    """A run of Weights & Biases, offline where WANDB_MODE says so. A resumed one goes on; of steps that it
    took back the first numbers stay."""
    import wandb

    quiet = wandb.Settings(console="off")
    try:
        there = wandb.init(project=PROJECT, name=run, id=mark(folder), dir=folder, resume="allow", settings=quiet)
    except wandb.errors.Error as error:
        fix = "Type wandb login, or set WANDB_MODE=offline."
        raise SiliconError(f"--track wandb: {error}", fix=fix, kind="bad_environment") from None
    with there:
        yield lambda numbers, at: there.log(dict(numbers), step=at)


@contextmanager
def to_trackio(run: str, folder: Path, step: int) -> Iterator[Log]:
    """A run in trackio's database on this computer (TRACKIO_DIR). A resumed one goes on; steps that it took
    back stand there twice."""
    import trackio

    with redirect_stdout(sys.stderr):  # stdout is for results
        there = trackio.init(project=PROJECT, name=f"{run}-{mark(folder)}", resume="allow", embed=False)
    try:
        yield lambda numbers, at: there.log(dict(numbers), step=at)
    finally:
        with redirect_stdout(sys.stderr):
            trackio.finish()


BACKENDS: dict[str, Callable[[str, Path, int], AbstractContextManager[Log]]] = {
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
    "trackio": to_trackio,
}


def mark(folder: Path) -> str:
    """What tells a run from others of its name, also when it is resumed: a hash of its log's first line."""
    with open(folder / "log.jsonl", "rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()[:8]
