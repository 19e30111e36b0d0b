"""One function a command. Parts are put together here and nowhere else: settings go in, events come out.

Only `silicon doctor` stands elsewhere (`hardware.diagnosis.diagnose`): it must answer where torch cannot be imported.
"""

from __future__ import annotations

import math
import re
import secrets
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siliconlm import config as configs
from siliconlm.config import Layer, RunConfig, SampleConfig
from siliconlm.data.batches import Batches
from siliconlm.data.prepare import Dataset, datasets, open_dataset, prepare
from siliconlm.data.sources import BUILTIN
from siliconlm.data.tokenizer import Tokenizer, byte_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen, Event, Foreseen, Notice, Probed, Resumed, Saved, Started, Tested, Working
from siliconlm.hardware.device import Device, is_out_of_memory, open_device, plain_words
from siliconlm.inference.session import check_prompt, generate
from siliconlm.model.decoder import Decoder, count_parameters
from siliconlm.model.families import family_of
from siliconlm.model.weights import MODEL_FILES, read_model
from siliconlm.training.checkpoint import (
    Checkpoint,
    RunFolder,
    all_runs,
    check_new_run,
    create_run,
    find_run,
    free_run_name,
    read_log,
)
from siliconlm.training.loop import evaluate, evaluation_batch, fit
from siliconlm.training.schedule import Budget
from siliconlm.training.state import TrainState, other_data
from siliconlm.tuning import profiles, selftest_child
from siliconlm.tuning.memory import forecast_process
from siliconlm.tuning.probe import best_of, probe_batches
from siliconlm.tuning.profiles import PROFILE_SECONDS
from siliconlm.tuning.selftest import INSTEAD

DEFAULT_PRESET = "tiny"
UNMEASURED_TOKENS = 4096  # of a micro-batch that nobody chose and nothing measured
TOO_MUCH = "Train under another --name with a smaller --set machine.micro_batch=... or --preset; checkpoints are whole."
NO_ROOM = "Close what else uses memory, or choose another --device."
Stop = Callable[[], str | None]

__all__ = ["BUILTIN", "prepare"]  # that stand elsewhere; the commands find them here


@dataclass(frozen=True, slots=True)
class Request:
    """What a command that needs a training setup was asked for; `flags` and `assignments` lie above the profile."""

    data: str | None = None
    preset: str | None = None
    profile: str = "auto"
    assignments: tuple[str, ...] = ()
    flags: tuple[Layer, ...] = ()


# --- setting up ------------------------------------------------------------------------------------------------------


def resolve_request(request: Request, dataset: Dataset | None, measured: Layer | None = None) -> RunConfig:
    """defaults < preset < profile < --set < flags, with the vocabulary of the data."""
    layers = [configs.read_profile(request.preset or DEFAULT_PRESET, kind="preset")]
    if measured:
        layers.append(measured)
    elif request.profile not in ("auto", "none"):
        layers.append(configs.read_profile(request.profile))
    layers += [configs.parse_assignments(request.assignments), *request.flags]
    config = configs.resolve(*layers)
    family_of(config.model)  # a shape that no checkpoint could be written of is refused before any work
    if dataset is None:
        return config
    if request.data or not config.data.name:
        config = config.replace("--data" if request.data else "default", **{"data.name": dataset.name})
    if not config.model.vocab_size:
        config = config.replace("data", **{"model.vocab_size": padded_vocabulary(dataset.tokenizer)})
    if config.model.vocab_size < dataset.tokenizer.size:
        raise SiliconError(
            f"model.vocab_size {config.model.vocab_size} is less than the tokenizer's {dataset.tokenizer.size}",
            where=config.sources["model.vocab_size"],
            fix="Leave model.vocab_size out.",
        )
    return config


def dataset_name(sources: list[str]) -> str:
    """The name a dataset gets when none is given: that of its first source."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(sources[0]).stem).strip("-._")[:80]
    return stem or "data"


def padded_vocabulary(tokenizer: Tokenizer) -> int:
    """The embedding's rows: the tokenizer's size rounded up to a multiple of 64, which every runtime likes."""
    return -(-tokenizer.size // 64) * 64


def default_data(request: Request) -> str | None:
    """The dataset that a request names or implies: the only one there is, or the built-in corpus; None without any."""
    named = request.data or resolve_request(request, None).data.name
    there = datasets()
    if named or not there:
        return named or None
    if len(there) > 1 and BUILTIN not in there:
        raise SiliconError("there are several datasets", fix=f"Type --data and one of: {', '.join(there)}.")
    return there[0] if len(there) == 1 else BUILTIN


def find_data(request: Request) -> Generator[Event, None, Dataset]:
    """The dataset of a request; where nothing is prepared yet, the built-in corpus, prepared and said so."""
    name = default_data(request)
    if name is None:
        name = BUILTIN
        yield Notice("nothing is prepared yet: preparing the built-in corpus (generated plays, about 1 MB)")
        yield from prepare([BUILTIN], BUILTIN)
    elif not request.data:
        yield Notice(f"training on dataset {name}")
    return open_dataset(name)


def tune(request: Request, dataset: Dataset, dry: bool = False) -> Generator[Event, None, RunConfig]:
    """The config of a request with this machine's settings in it: from the cache, or measured now."""
    base = resolve_request(request, dataset)
    device = open_device(base.machine)
    device.check_model(base.model)
    if request.profile != "auto" or base.machine.micro_batch:
        return (yield from _fill_machine(base, device))
    found, trouble = profiles.cached(base, device)
    if trouble:
        yield Notice(trouble, "warning")
    if found is None and dry:
        yield Notice("no profile is cached for this model on this machine; training would measure one first")
        return (yield from _fill_machine(base, device))
    if found is None:
        yield Notice(f"measuring this machine once for this model (at most {PROFILE_SECONDS:.0f} s)")
        found = yield from profiles.make_profile(base, device)
        yield Notice(f"profile kept in {profiles.store(found)}")
    else:
        yield from found.choices
    tuned = resolve_request(request, dataset, found.layer())
    return (yield from _fill_machine(tuned, open_device(tuned.machine), found.choices))


def _fill_machine(config: RunConfig, device: Device, told: Sequence[Chosen] = ()) -> Generator[Event, None, RunConfig]:
    """Put the resolved device, dtype, threads and a micro-batch into the config, so that run.toml says what ran."""
    values: dict[str, Any] = {"machine.device": device.kind, "machine.dtype": device.dtype_name}
    values["machine.threads"] = device.threads
    most, fault = device.largest_micro_batch(config.model)
    if most < 1:
        raise SiliconError(
            f"not even one sequence of {config.model.context:,} tokens can be trained on this device: {fault}",
            where=config.sources.get("model.context", ""),
            fix="Choose a smaller --set model.context=... or another --device.",
        )
    if config.machine.micro_batch is None:
        fits = [size for size in configs.divisors(config.sequences_per_step) if size <= most]
        size = max(size for size in fits if size == 1 or size * config.model.context <= UNMEASURED_TOKENS)
        values["machine.micro_batch"] = size
        yield Chosen("machine.micro_batch", size, f"not measured: at most {UNMEASURED_TOKENS:,} tokens at once")
    elif config.machine.micro_batch > most:
        raise SiliconError(
            f"micro-batch {config.machine.micro_batch} is too big for this device: {fault}",
            where=config.sources.get("machine.micro_batch", ""),
            fix=f"Use at most {most}.",
        )
    settled = {choice.setting for choice in told}
    yield from (choice for choice in device.choices if choice.setting not in settled)
    return config.replace("device", **{name: value for name, value in values.items() if _unset(config, name)})


def _unset(config: RunConfig, name: str) -> bool:
    return getattr(config.machine, name.removeprefix("machine.")) in (None, "auto", 0)


# --- self-test -------------------------------------------------------------------------------------------------------


def self_test(device: str | None = None) -> Iterator[Tested]:
    """The device's arithmetic held against the CPU's, for every operation that training and sampling use."""
    place = open_device(configs.resolve(Layer("--device", {"machine.device": device})).machine)
    for verdict in selftest_child.self_test(place):
        error = verdict.error if math.isfinite(verdict.error) else None
        remedy = "" if verdict.passed else INSTEAD[verdict.needed]
        yield Tested(verdict.name, verdict.passed, error, verdict.limit, verdict.detail, remedy)


# --- probe-batch, profile --------------------------------------------------------------------------------------------


def probe_batch(request: Request, seconds: float = PROFILE_SECONDS) -> Iterator[Event]:
    """Micro-batches tried by real training steps; ends with the choice."""
    config, device = yield from _shape(request)
    rows: list[Probed] = []
    for row in probe_batches(config, device, seconds):
        rows.append(row)
        yield row
    best = best_of(rows)
    if best is None:
        reason = rows[-1].reason if rows else "nothing was tried"
        raise SiliconError(
            f"not even a micro-batch of 1 trains here: {reason}",
            fix="Choose a smaller --preset, or --set model.context=... .",
            kind="out_of_memory",
        )
    yield Chosen("machine.micro_batch", best.micro_batch, "the smallest within 2 % of the best speed")


def profile(request: Request, seconds: float = PROFILE_SECONDS, refresh: bool = False) -> Iterator[Event]:
    """Measure this machine for a model shape, or show what was measured before."""
    config, device = yield from _shape(request)
    found, trouble = (None, "") if refresh else profiles.cached(config, device)
    if trouble:
        yield Notice(trouble, "warning")
    if found:
        yield Notice(f"measured before: {profiles.profile_path(found.fingerprint)} (--refresh measures again)")
        yield from found.probes
        yield from found.choices
        return
    yield from (choice for choice in device.choices if choice.setting == "machine.device")
    made = yield from profiles.make_profile(config, device, seconds)
    yield Notice(f"profile kept in {profiles.store(made)}")


def _shape(request: Request) -> Generator[Event, None, tuple[RunConfig, Device]]:
    """The config and device of a request whose data may not be prepared: then the byte vocabulary stands in."""
    if known := default_data(request):
        with open_dataset(known) as dataset:
            config = resolve_request(request, dataset)
    else:
        config = resolve_request(request, None)
        if not config.model.vocab_size:
            config = config.replace("byte tokenizer", **{"model.vocab_size": padded_vocabulary(byte_tokenizer())})
            yield Notice("nothing is prepared yet: measuring with the byte tokenizer's vocabulary")
    device = open_device(config.machine)
    device.check_model(config.model)
    return config, device


# --- train, resume ---------------------------------------------------------------------------------------------------


def forecast(request: Request) -> Iterator[Event | RunConfig]:
    """What `train` would do: the settings (a RunConfig) and the run's shape (a Started). Nothing is measured."""
    resolve_request(request, None)
    with (yield from find_data(request)) as dataset:
        choices: list[Chosen] = []
        config = yield from _gathering(tune(request, dataset, dry=True), choices)
        Batches(dataset.train, config.model.context, config.train.seed)
        yield config
        device = open_device(config.machine)
        yield _started(config, "(dry run)", "", dataset, device, choices)
        needs = forecast_process(config, device)
        yield Foreseen(needs.resident or needs.peak, needs.weights, needs.optimizer_state, needs.hazards)


def train(request: Request, name: str | None = None, stop: Stop = lambda: None) -> Iterator[Event]:
    """Start a run: data, settings for this machine, model, loop. Every event is also in the run's log."""
    resolve_request(request, None)  # a wrong word is refused before any work, and so is a name in use
    if name:
        check_new_run(name)
    with (yield from find_data(request)) as dataset:
        choices: list[Chosen] = []
        base = resolve_request(request, dataset)
        Budget.of(base.train)
        Batches(dataset.train, base.model.context, base.train.seed)  # refuse a context longer than the data at once
        dataset.verify()  # damaged data is refused before a run takes its name
        config = yield from _gathering(tune(request, dataset), choices)
        preset = Path(request.preset or DEFAULT_PRESET).stem
        about = {"dataset": str(dataset.path), "data": dataset.fingerprint, "preset": preset}
        run = create_run(name or free_run_name(f"{dataset.name}-{preset}"), config, about)
        with run.lock():
            yield from _logged(run, _run(run, config, dataset, stop, choices=choices))


def _gathering(work: Generator[Event, None, RunConfig], choices: list[Chosen]) -> Generator[Event, None, RunConfig]:
    """Pass events on and keep the choices among them."""
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            return stop.value
        if isinstance(event, Chosen):
            choices.append(event)
        yield event


def resume(name: str | None = None, stop: Stop = lambda: None, device: str | None = None) -> Iterator[Event]:
    """Go on with a run exactly where its newest whole checkpoint stands; from the start if it never had one.

    On another `device` than the run was made for it goes on too, but not to the same bits.
    """
    run = find_run(name)
    config, about = run.config()
    if device and device != config.machine.device:
        config = config.replace("--device", **{"machine.device": device, "machine.dtype": "auto"})
        yield Notice(f"going on with {device}: the result will not be the same to the bit", "warning")
    with run.lock():
        checkpoint = None
        if run.checkpoints():
            checkpoint, skipped = run.newest()
            yield from (Notice(line, "warning") for line in skipped)
        else:
            yield Notice(f"run {run.name} stopped before its first checkpoint: it starts again")
        with _dataset_of(config, about) as dataset:
            dataset.verify()
            if about.get("data") != dataset.fingerprint:
                raise other_data(str(dataset.path))
            yield from _logged(run, _run(run, config, dataset, stop, checkpoint))


def _dataset_of(config: RunConfig, about: Mapping[str, Any]) -> Dataset:
    """A run's dataset where it was, or by its name where the home has moved. `restore` compares the contents."""
    path = str(about.get("dataset", ""))
    return open_dataset(path if path and Path(path).is_dir() else config.data.name)


def _run(
    run: RunFolder,
    config: RunConfig,
    dataset: Dataset,
    stop: Stop,
    checkpoint: Checkpoint | None = None,
    choices: Sequence[Chosen] | None = None,
) -> Iterator[Event]:
    """Train from a checkpoint or from the start. `choices` are those a new run was begun with; None resumes one."""
    device = open_device(config.machine)
    state = TrainState.new(config, device)
    yield _started(config, run.name, str(run.path), dataset, device, choices or [])
    if checkpoint:
        state.restore(checkpoint, dataset.fingerprint)
    if choices is None:
        yield Resumed(state.step, str(checkpoint.path) if checkpoint else "")
        if Budget.of(config.train).done(state.step, state.seconds) >= 1:
            yield Notice(f"run {run.name} has used its budget of {Budget.of(config.train).describe()}")
    batches = Batches(dataset.train, config.model.context, config.train.seed)

    def save() -> Saved:
        return state.save(run, dataset.tokenizer, dataset.fingerprint)

    yield from fit(state, batches, dataset, (run.name, str(run.path)), save, stop)


def _logged(run: RunFolder, events: Iterator[Event]) -> Iterator[Event]:
    with _telling_out_of_memory(TOO_MUCH):
        for event in events:
            if not isinstance(event, Working):
                run.log(event)
            yield event


@contextmanager
def _telling_out_of_memory(fix: str) -> Iterator[None]:
    """Memory that runs out is something the user can mend: an error that says how, not a traceback."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SiliconError(f"out of memory: {plain_words(error)}", fix=fix, kind="out_of_memory") from None


def _started(
    config: RunConfig, name: str, path: str, dataset: Dataset, device: Device, choices: Sequence[Chosen]
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
        budget=Budget.of(config.train).describe(),
        choices=list(choices),
    )


# --- using a model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """A model ready to use, and the run it came from (None for a folder that is no run of ours)."""

    model: Decoder
    tokenizer: Tokenizer
    run: RunFolder | None
    step: int
    path: Path


def open_model(name: str | None, step: int | str | None = None) -> Generator[Event, None, Opened]:
    """The one door: a run by name or path (its newest whole checkpoint, or a step), or a Hugging Face folder."""
    folder = Path(name).expanduser() if name else None
    if folder and (folder / "config.json").is_file():
        return Opened(*read_model(folder), None, 0, folder)
    run = find_run(name)
    if step is None:
        checkpoint, skipped = run.newest(MODEL_FILES)
        yield from (Notice(line, "warning") for line in skipped)
    else:
        checkpoint = run.at_step(step)
    model, tokenizer = read_model(checkpoint.path, checkpoint.sha256("model.safetensors"))
    return Opened(model, tokenizer, run, checkpoint.step, checkpoint.path)


def sample(
    prompt: str, name: str | None, settings: SampleConfig, device: str | None = None, step: int | str | None = None
) -> Iterator[Event]:
    """Continue a prompt with a trained model; streams pieces of text."""
    opened = yield from open_model(name, step)
    check_prompt(opened.tokenizer, prompt)
    place = open_device(configs.resolve(Layer("--device", {"machine.device": device})).machine)
    seed = settings.seed if settings.seed is not None else secrets.randbits(32)
    with _telling_out_of_memory(NO_ROOM):
        opened.model.to(place.torch_device)
        for index in range(settings.num_samples):
            yield from generate(opened.model, opened.tokenizer, place, prompt, settings, seed, index)


def validate(
    name: str | None, data: str | None = None, device: str | None = None, step: int | str | None = None
) -> Iterator[Event]:
    """Loss of a model on the whole validation split of its dataset (or of another with the same tokenizer)."""
    opened = yield from open_model(name, step)
    machine = Layer("--device", {"machine.device": device})
    if data:
        dataset = open_dataset(data)
    elif opened.run:
        dataset = _dataset_of(*opened.run.config())
    else:
        raise SiliconError("a model folder has no dataset of its own", fix="Type --data NAME.", kind="missing_input")
    place = open_device(configs.resolve(machine).machine)
    with dataset, _telling_out_of_memory(NO_ROOM):
        dataset.val.verify()
        if dataset.tokenizer.sha256 != opened.tokenizer.sha256:
            raise SiliconError(
                f"dataset {dataset.name} was made with another tokenizer than the model's",
                fix=f"Prepare it with --tokenizer {shlex.quote(str(opened.path / 'tokenizer.json'))}.",
            )
        batch = evaluation_batch(opened.model.config.context)
        yield (yield from evaluate(opened.model.to(place.torch_device), dataset, place, batch, opened.step))


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
        "budget": Budget.of(config.train).describe(),
        "val_loss": evaluated["val_loss"] if evaluated else None,
        "val_bpb": evaluated["val_bpb"] if evaluated else None,
        "state": "running" if run.in_use() else "done" if reason == "done" else reason,
        "written": log[-1]["at"] if log else None,
    }
