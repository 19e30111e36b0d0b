"""Runs: forecast, begun, gone on with, and listed."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from siliconlm.config import RunConfig, SampleConfig, duration, write_run
from siliconlm.data.conversations import (
    read_questions,
)
from siliconlm.data.dataset import Dataset
from siliconlm.data.packing import training_stream, validation
from siliconlm.engine.measuring import shaped
from siliconlm.engine.models import dataset_of, sample, talk
from siliconlm.engine.setup import (
    NO_ROOM,
    TOO_MUCH,
    Request,
    Stop,
    fill_machine,
    find_data,
    gathering,
    resolve_request,
    telling_out_of_memory,
    tune,
    without_choices,
)
from siliconlm.errors import SiliconError
from siliconlm.events import (
    Chosen,
    Event,
    Example,
    Finished,
    Foreseen,
    Notice,
    Resumed,
    Sampled,
    Saved,
    Started,
    Working,
)
from siliconlm.hardware.device import (
    Device,
    open_device,
    processor_name,
    torch_facts,
)
from siliconlm.hardware.facts import disk_free, in_words
from siliconlm.hardware.watch import Awake, Watch, read
from siliconlm.model.decoder import Decoder, count_parameters
from siliconlm.model.weights import read_model
from siliconlm.training.checkpoint import (
    Checkpoint,
    RunFolder,
    all_runs,
    check_new_run,
    checkpoint_bytes,
    create_run,
    find_run,
    free_run_name,
    kept_bytes,
    read_log,
    runs_folder,
)
from siliconlm.training.loop import evaluation_seconds, fit
from siliconlm.training.schedule import Budget
from siliconlm.training.state import TrainState, other_data
from siliconlm.tuning.memory import forecast_process
from siliconlm.tuning.verdicts import open_sound

EXAMPLE = SampleConfig(max_tokens=120, seed=1)  # what a model writes at the end of its training
EXAMPLE_SECONDS = 5.0  # for all of them, at most
EXAMPLE_SHARE = 0.01  # of a time budget, at most
PROMPT_LENGTH = 80


def forecast(request: Request) -> Iterator[Event | RunConfig]:
    """What `train` would do: the settings (a RunConfig), the run's shape (a Started) and its needs (a Foreseen).

    Nothing is measured but what a plan needs to name a model.
    """
    deadline = resolve_request(request, None).train.until
    with (yield from find_data(request)) as dataset:
        choices: list[Chosen] = []
        request, planned = yield from gathering(shaped(request, dataset), choices)
        tuned, tokens_per_s = yield from gathering(tune(request, dataset, dry=True), choices)
        tokens_per_s = tokens_per_s or planned
        config = by_the_clock(tuned, deadline)
        training_stream(dataset, config.model.context, config.data, config.train.seed)
        yield config
        device = open_device(config.machine)
        budget = Budget.of(config.train, deadline=deadline)
        yield _started(config, "(dry run)", "", dataset, device, choices, budget)
        yield from tell_disk(config)
        yield _foreseen(config, dataset, device, budget, tokens_per_s)


def _foreseen(config: RunConfig, dataset: Dataset, device: Device, budget: Budget, tokens_per_s: float) -> Foreseen:
    """What a run will need, by a dry run of its step and the speed that was measured for it; 0 where none was."""
    needs = forecast_process(config, device)
    tokens = budget.steps * config.train.tokens_per_step if budget.steps else None
    seconds = budget.seconds
    if tokens_per_s:
        evaluating = evaluation_seconds(config, dataset.val.count, budget, tokens_per_s)
        tokens = tokens or round(tokens_per_s * max(0.0, (seconds or 0.0) - evaluating))
        seconds = seconds or tokens / tokens_per_s + evaluating
    return Foreseen(
        needs.resident or needs.peak,
        needs.weights,
        needs.optimizer_state,
        needs.hazards,
        tokens,
        tokens / dataset.train.count if tokens else None,
        seconds,
        tokens_per_s or None,
        kept_bytes(config),
        disk_free(runs_folder()),
    )


def tell_disk(config: RunConfig) -> Iterator[Notice]:
    """Warn where the disk cannot hold the checkpoints of a run."""
    need, free = kept_bytes(config), disk_free(runs_folder())
    if free is not None and need > free:
        room = f"its checkpoints may take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {runs_folder()}"
        yield Notice(f"the disk may fill up: {room} (fewer are kept with --set train.keep=2)", "warning")


def by_the_clock(config: RunConfig, deadline: datetime | None) -> RunConfig:
    """The config with the time until its deadline as the budget, where it has a deadline."""
    if deadline is None:
        return config
    left = (deadline - datetime.now(UTC)).total_seconds()
    if left <= 0:
        raise SiliconError(
            f"{deadline:%H:%M} came before training could begin",
            where=config.sources["train.until"],
            fix="Choose a later moment; silicon profile measures this machine beforehand.",
        )
    return config.with_time(config.sources["train.until"], left)


def train(request: Request, name: str | None = None, stop: Stop = lambda: None) -> Iterator[Event]:
    """Start a run: data, settings for this machine, model, loop. Every event is also in the run's log."""
    # A wrong word is refused before any work, and so is a name in use. What 07:00 means is read here, once.
    deadline = resolve_request(request, None).train.until
    if name:
        check_new_run(name)
    with (yield from find_data(request)) as dataset:
        choices: list[Chosen] = []
        request, planned = yield from gathering(shaped(request, dataset), choices)
        base = by_the_clock(resolve_request(request, dataset), deadline)
        Budget.of(base.train)
        training_stream(dataset, base.model.context, base.data, base.train.seed)  # refuse at once what cannot be cut
        dataset.verify()  # damaged data is refused before a run takes its name
        tuned, tokens_per_s = yield from gathering(tune(request, dataset), choices)
        tokens_per_s = tokens_per_s or planned
        config = by_the_clock(tuned, deadline)
        yield from tell_disk(config)
        about: dict[str, Any] = {
            "dataset": str(dataset.path),
            "data": dataset.fingerprint,
            "preset": request.shape_name,
        }
        if deadline:
            about["deadline"] = deadline
        if tokens_per_s:
            about["tokens_per_s"] = tokens_per_s
        run = create_run(name or free_run_name(f"{dataset.name}-{request.shape_name}"), config, about)
        with run.lock():
            yield from logged(run, run_events(run, config, dataset, stop, choices=choices))


def resume(
    name: str | None = None,
    stop: Stop = lambda: None,
    device: str | None = None,
    extend: float | None = None,
    on_battery: str | None = None,
) -> Iterator[Event]:
    """Go on with a run exactly where its newest whole checkpoint stands; from the start if it never had one.

    On another `device` than the run was made for it goes on too, but not to the same bits. `extend` adds seconds to a
    time budget, or begins a new one after a run that is finished.
    """
    run = find_run(name)
    config, about = run.config()
    if device and device != config.machine.device:
        config = config.replace("--device", **{"machine.device": device, "machine.dtype": "auto"})
        yield Notice(f"going on with {device}: the result will not be the same to the bit", "warning")
        config = yield from _moved(config)
    else:  # the folder may have come from another machine, or a self-test may have found something since
        config = yield from without_choices(_moved(config))
    if on_battery:
        config = config.replace("--on-battery", **{"machine.on_battery": on_battery})
    with run.lock():
        checkpoint, base = None, None
        if run.checkpoints():
            checkpoint, skipped = run.newest()
            yield from (Notice(line, "warning") for line in skipped)
        else:
            yield Notice(f"run {run.name} stopped before its first checkpoint: it starts again")
            base = _base_of(about)
        with dataset_of(config, about) as dataset:
            dataset.verify()
            if about.get("data") != dataset.fingerprint:
                raise other_data(str(dataset.path))
            yield from logged(run, run_events(run, config, dataset, stop, checkpoint, base=base, extend=extend))


def _moved(config: RunConfig) -> Generator[Event, None, RunConfig]:
    """The config of a run that goes on, maybe on another device, within what the device can do."""
    place = yield from open_sound(config.machine)
    place.check_model(config.model)
    most, _ = place.largest_micro_batch(config.model, config.machine)
    if (config.machine.micro_batch or 1) > most:
        config = config.model_copy(update={"machine": config.machine.model_copy(update={"micro_batch": None})})
    return (yield from fill_machine(config, place))


def run_events(
    run: RunFolder,
    config: RunConfig,
    dataset: Dataset,
    stop: Stop,
    checkpoint: Checkpoint | None = None,
    choices: Sequence[Chosen] | None = None,
    base: Decoder | None = None,
    extend: float | None = None,
) -> Iterator[Event]:
    """Train from a checkpoint, from a base's weights, or from the start. `choices` are those a new run was begun with;
    None resumes one."""
    device = open_device(config.machine)
    state = TrainState.new(config, device, base)
    if checkpoint:
        state.restore(checkpoint, dataset.fingerprint)
    made_for, about = run.config()
    budget, news = budget_of(made_for, about), None
    if choices is None:
        budget, news = _renewed(run, budget, state, extend)
    yield _started(config, run.name, str(run.path), dataset, device, choices or [], budget)
    if choices is None:
        yield Resumed(state.step, str(checkpoint.path) if checkpoint else "")
    if news:
        yield news
    batches = training_stream(dataset, config.model.context, config.data, config.train.seed)
    windows = validation(dataset, config.model.context, config.data)

    def save() -> Saved:
        return state.save(run, dataset.tokenizer, dataset.fingerprint, dataset.card.get("template"))

    measured = about.get("tokens_per_s", 0.0) if device.kind == made_for.machine.device else 0.0
    watch = Watch(config.machine.on_battery, partial(read, run.path), checkpoint_bytes(config), measured)
    with Awake() as hold:
        watch.asleep = hold.released
        yield from hold.notices
        told, seconds = (run.name, str(run.path)), _example_seconds(budget)
        work = fit(state, batches, dataset, windows, budget, told, save, stop, watch, seconds, begin=base is not None)
        for event in work:
            if isinstance(event, Finished) and event.reason == "done":
                if budget.deadline:
                    seconds = min(seconds, (budget.deadline - datetime.now(UTC)).total_seconds())
                yield from _examples(run, event.step, dataset, device, seconds)
            yield event


def _example_seconds(budget: Budget) -> float:
    """The most that examples may take; of a time budget a share, which is kept back for them."""
    return EXAMPLE_SECONDS if budget.seconds is None else min(EXAMPLE_SECONDS, EXAMPLE_SHARE * budget.span)


def _examples(run: RunFolder, step: int, dataset: Dataset, device: Device, seconds: float) -> Iterator[Event]:
    """Short texts by the model as it was saved, cut short where `seconds` are over."""
    end = time.monotonic() + seconds
    write = _answer if dataset.is_chat else sample

    def in_time(_: object) -> bool:
        return time.monotonic() < end

    try:
        for prompt in takewhile(in_time, _prompts(dataset)):
            pieces = takewhile(in_time, write(prompt, str(run.path), EXAMPLE, device.kind))
            if text := "".join(piece.text for piece in pieces if isinstance(piece, Sampled)):
                yield Example(step, prompt, text)
    except SiliconError as error:
        yield Notice(f"no example was written: {error}", "warning")


def _prompts(dataset: Dataset) -> list[str]:
    """What examples begin with: held-out questions of two tasks, or nothing and a line of the validation text."""
    if dataset.is_chat:
        return [asked[0][-2].content for asked in islice(read_questions(dataset).values(), 2)]
    lines = dataset.tokenizer.decode(dataset.val.read(0, min(1000, dataset.val.count)).tolist()).split("\n")
    whole = (line for line in [*lines[1:-1], *lines] if line.strip())
    return ["", *(line[:PROMPT_LENGTH] for line in islice(whole, 1))]


def _answer(question: str, name: str, settings: SampleConfig, device: str) -> Iterator[Event]:
    """What a model answers to a question, in pieces."""
    conversation = yield from talk(name, settings, device)
    with telling_out_of_memory(NO_ROOM):
        yield from conversation.ask(question)


def budget_of(config: RunConfig, about: Mapping[str, Any]) -> Budget:
    """The budget of a run by its run.toml."""
    return Budget.of(config.train, about.get("extended_at", 0.0), about.get("deadline"))


def _renewed(run: RunFolder, budget: Budget, state: TrainState, extend: float | None) -> tuple[Budget, Notice | None]:
    """The budget to go on with, and what to say of it. One that has changed is written into run.toml."""
    now, used_up = datetime.now(UTC), budget.done(state.step, state.seconds) >= 1
    if extend is not None:
        current = budget if used_up else budget.resumed(state.seconds, now)
        renewed = current.extended(state.step, state.seconds, extend)
        what = "the learning rate warms up and decays once more" if used_up else f"now {renewed.describe()}"
        news = Notice(f"extended by {duration(extend)}: {what}")
    elif used_up:
        return replace(budget, deadline=None), Notice(f"run {run.name} has used its budget of {budget.describe()}")
    elif budget.deadline is None:
        return budget, None
    else:
        renewed = budget.resumed(state.seconds, now)
        moment, left = f"{budget.deadline:%Y-%m-%d %H:%M}", duration(renewed.seconds_left(0.0, state.seconds) or 0.0)
        if renewed.deadline:
            news = Notice(f"{left} left until {moment}")
        else:
            news = Notice(f"{moment} is past: going on with the {left} that were left of the budget", "warning")
    _write_budget(run, renewed, "--extend" if extend else "--until")
    return renewed, news


def _write_budget(run: RunFolder, budget: Budget, source: str) -> None:
    config, about = run.config()
    assert budget.seconds is not None
    facts = {"extended_at": budget.start or None, "deadline": budget.deadline}
    about = {name: value for name, value in (about | facts).items() if value is not None}
    write_run(run.path / "run.toml", config.with_time(source, budget.seconds), about)


def logged(run: RunFolder, events: Iterator[Event]) -> Iterator[Event]:
    with telling_out_of_memory(TOO_MUCH):
        for event in events:
            if not isinstance(event, Working):
                run.log(event)
            yield event


def _started(
    config: RunConfig,
    name: str,
    path: str,
    dataset: Dataset,
    device: Device,
    choices: Sequence[Chosen],
    budget: Budget,
) -> Started:
    micro = config.machine.micro_batch or 1
    return Started(
        run=name,
        path=path,
        dataset=dataset.name,
        device=f"{device.kind} {device.dtype_name}",
        parameters=count_parameters(config.model),
        micro_batch=micro,
        accumulation=config.sequences_per_step // micro,
        tokens_per_step=config.train.tokens_per_step,
        context=config.model.context,
        budget=budget.describe(),
        choices=list(choices),
        machine=in_words(processor_name(device.kind), torch_facts().version or ""),
    )


def _base_of(about: Mapping[str, Any]) -> Decoder | None:
    """The model that a tuned run begins with, which must still be what it was; None for a run from nothing."""
    if "from_path" not in about:
        return None
    folder = Path(about["from_path"])
    return read_model(folder, about["from_sha256"])[0]


def runs() -> list[dict[str, Any]]:
    """A row for every run: what it is, how far it came, its last validation loss."""
    return [_summary(run) for run in all_runs()]


def _summary(run: RunFolder) -> dict[str, Any]:
    try:
        config, about = run.config()
    except SiliconError as error:
        return {"run": run.name, "path": str(run.path), "state": f"damaged: {error}"}
    log = read_log(run)
    last = {event["event"]: event for event in log}
    finished, evaluated = last.get("finished"), last.get("evaluated")
    started = last.get("started", {})
    reason = finished["reason"] if finished and log[-1]["event"] == "finished" else "interrupted"
    return {
        "run": run.name,
        "path": str(run.path),
        "dataset": config.data.name,
        "preset": about.get("preset", "-"),
        "parameters": started.get("parameters"),
        "step": max((event.get("step", 0) for event in log), default=0),
        "budget": budget_of(config, about).describe(),
        "val_loss": evaluated["val_loss"] if evaluated else None,
        "val_bpb": evaluated["val_bpb"] if evaluated else None,
        "state": "running" if run.in_use() else "done" if reason == "done" else reason,
        "written": log[-1]["at"] if log else None,
    }
