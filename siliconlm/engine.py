"""One function a command. Parts are put together here and nowhere else: settings go in, events come out.

Only `silicon doctor` stands elsewhere (`hardware.diagnosis.diagnose`): it must answer where torch cannot be imported.
"""

from __future__ import annotations

import itertools
import math
import re
import secrets
import shlex
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

from siliconlm import config as configs
from siliconlm.config import DataConfig, Layer, MachineConfig, RunConfig, SampleConfig, duration, write_run
from siliconlm.data.chat import Template, open_template
from siliconlm.data.conversations import (
    BUILTIN_CHAT,
    hold_conversations,
    prepare_chat,
    read_questions,
    record_files,
    show,
)
from siliconlm.data.hub import HUB, fetch_dataset
from siliconlm.data.packing import training_stream, validation
from siliconlm.data.prepare import VAL_FRACTION, VOCAB_SIZE, Dataset, datasets, given_tokenizer, open_dataset, prepare
from siliconlm.data.sources import BUILTIN
from siliconlm.data.tokenizer import Tokenizer, byte_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import (
    Chosen,
    Event,
    Example,
    Finished,
    Foreseen,
    Notice,
    Prepared,
    Resumed,
    Sampled,
    Saved,
    Scored,
    Started,
    Tested,
    Working,
)
from siliconlm.files import copy_file, sha256, staged_folder
from siliconlm.hardware.device import (
    Device,
    is_out_of_memory,
    lacks_compiler,
    open_device,
    plain_words,
    processor_name,
    torch_facts,
)
from siliconlm.hardware.facts import disk_free, in_words, processor_share
from siliconlm.hardware.watch import Awake, Watch, read
from siliconlm.inference.answers import answers
from siliconlm.inference.conversation import Talk
from siliconlm.inference.harness import measure
from siliconlm.inference.session import check_prompt, generate
from siliconlm.model.decoder import Decoder, count_parameters
from siliconlm.model.families import family_of
from siliconlm.model.weights import MODEL_FILES, TEMPLATE_FILE, read_model, read_template
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
from siliconlm.training.loop import evaluate, evaluation_batch, evaluation_seconds, fit
from siliconlm.training.schedule import Budget
from siliconlm.training.state import TrainState, other_data
from siliconlm.tuning import planner, profiles, selftest_child
from siliconlm.tuning.choose import FAILURES, PROFILE_SECONDS, make_profile, searching, settle, untrainable
from siliconlm.tuning.memory import forecast_process
from siliconlm.tuning.search import largest
from siliconlm.tuning.selftest import INSTEAD
from siliconlm.tuning.verdicts import features_of, gated, open_sound, remembering, tested, within

DEFAULT_PRESET = "tiny"
TOO_MUCH = "Train under another --name with a smaller --set machine.micro_batch=... or --preset; checkpoints are whole."
UNPROFILED_SECONDS = 600.0  # a planned run shorter than this is not worth a minute of profiling
BUSY = 0.25  # of the processor, taken by other programs: measurements then tell little
EXAMPLE = SampleConfig(max_tokens=120, seed=1)  # what a model writes at the end of its training
EXAMPLE_SECONDS = 5.0  # for all of them, at most
EXAMPLE_SHARE = 0.01  # of a time budget, at most
PROMPT_LENGTH = 80
NO_ROOM = "Close what else uses memory, or choose another --device."
Stop = Callable[[], str | None]
T = TypeVar("T")

__all__ = ["BUILTIN", "prepare"]  # that stand elsewhere; the commands find them here


@dataclass(frozen=True, slots=True)
class Request:
    """What a command that needs a training setup was asked for; `flags` and `assignments` lie above the profile."""

    data: str | None = None
    preset: str | None = None
    profile: str = "auto"
    assignments: tuple[str, ...] = ()
    flags: tuple[Layer, ...] = ()
    shape: Layer | None = None  # a plan's choice, in place of a preset

    @property
    def shape_name(self) -> str:
        """Preset or planned rung, for the names of runs."""
        return self.shape.source.split()[-1] if self.shape else Path(self.preset or DEFAULT_PRESET).stem


# --- prepare ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preparation:
    """What `silicon prepare` was asked for. `base` is a model whose tokenizer and template conversations are for."""

    sources: tuple[str, ...] = (BUILTIN,)
    name: str | None = None
    tokenizer: str | None = None
    vocab_size: int = VOCAB_SIZE
    val_fraction: float = VAL_FRACTION
    force: bool = False
    field: str | None = None
    template: str | None = None
    base: str | None = None


def prepare_sources(asked: Preparation, show_mask: bool = False) -> Iterator[Event]:
    """Text or conversations into a dataset, whichever the sources hold; or only show what would be learned."""
    name = asked.name or dataset_name(list(asked.sources))
    sources = yield from _fetched(asked.sources)
    if asked.field is None and hold_conversations(sources):
        template = yield from _template_for(asked)
        if show_mask:
            yield from show(sources, template)
        else:
            yield from prepare_chat(sources, name, template, asked.val_fraction, asked.force)
        return
    given = {"--show-mask": show_mask, "--template": asked.template, "--base": asked.base}
    if wrong := [flag for flag, value in given.items() if value]:
        where = " ".join(asked.sources)
        raise SiliconError(f"{wrong[0]} is for conversations, and these are none", where=where, kind="usage")
    more = (asked.tokenizer, asked.vocab_size, asked.val_fraction, asked.force)
    yield from prepare(list(asked.sources), name, *more, field=asked.field)


def _fetched(words: Sequence[str]) -> Generator[Event, None, list[str]]:
    """The sources, those on the hub as the files that were fetched."""
    sources: list[str] = []
    for word in words:
        sources += map(str, (yield from fetch_dataset(word))) if word.startswith(HUB) else [word]
    return sources


def _template_for(asked: Preparation) -> Generator[Event, None, Template]:
    if asked.base and asked.tokenizer:
        raise SiliconError("--base and --tokenizer are both given; a base has its own tokenizer", kind="usage")
    if asked.base:
        opened = yield from open_model(asked.base)
        return open_template(opened.tokenizer, asked.template, read_template(opened.path))
    tokenizer = given_tokenizer(asked.tokenizer or "byte")
    if tokenizer is None:
        fix = "Type --base RUN, or --tokenizer byte."
        raise SiliconError(
            f"conversations are for a model that is there: no {asked.tokenizer} is made of them", fix=fix
        )
    return open_template(tokenizer, asked.template)


# --- setting up ------------------------------------------------------------------------------------------------------


def resolve_request(request: Request, dataset: Dataset | None, measured: Layer | None = None) -> RunConfig:
    """defaults < preset < profile < --set < flags, with the vocabulary of the data."""
    layers = [request.shape or configs.read_profile(request.preset or DEFAULT_PRESET, kind="preset")]
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


def tune(request: Request, dataset: Dataset, dry: bool = False) -> Generator[Event, None, tuple[RunConfig, float]]:
    """The config of a request with this machine's settings in it, from the cache or measured now, and the tokens/s
    that were measured with them; 0 where nothing was measured."""
    base = resolve_request(request, dataset)
    device = yield from open_sound(base.machine)
    device.check_model(base.model)
    if request.profile != "auto" or base.machine.micro_batch:
        return (yield from _fill_machine(base, device)), 0.0
    found, trouble = profiles.cached(base, device)
    if trouble:
        yield Notice(trouble, "warning")
    if found is None and dry:
        yield Notice("no profile is cached for this model on this machine; training would measure one first")
        return (yield from _fill_machine(base, device)), 0.0
    if found is None:
        yield Notice(f"measuring this machine once for this model (about {PROFILE_SECONDS:.0f} s)")
        found = yield from _measured(base, device, PROFILE_SECONDS)
    else:
        yield from found.choices
    tuned = resolve_request(request, dataset, found.layer())
    device = yield from open_sound(tuned.machine)
    return (yield from _fill_machine(tuned, device, found.choices)), found.tokens_per_s


def _measured(config: RunConfig, device: Device, seconds: float) -> Generator[Event, None, profiles.Profile]:
    """A profile measured now and kept. The device's arithmetic is tested before, if it never was."""
    device = yield from tested(device, config.machine)
    config = yield from gated(config, device)
    if (busy := processor_share()) > BUSY:
        yield Notice(f"other programs take {busy:.0%} of the processor: the figures will be low", "warning")
    made = yield from make_profile(config, device, seconds)
    yield Notice(f"profile kept in {profiles.store(made)}")
    return made


def _fill_machine(config: RunConfig, device: Device, told: Sequence[Chosen] = ()) -> Generator[Event, None, RunConfig]:
    """Put the resolved device, dtype, threads and a micro-batch into the config, so that run.toml says what ran."""
    config = yield from gated(config, device)
    if config.machine.compile and lacks_compiler(device):
        where = config.sources.get("machine.compile", "")
        fix = "Install one (g++ or clang++), or leave machine.compile off."
        raise SiliconError("machine.compile needs a C++ compiler, and there is none", where=where, fix=fix)
    values: dict[str, Any] = {"machine.device": device.kind, "machine.dtype": device.dtype_name}
    values["machine.threads"] = device.threads
    most, fault = device.largest_micro_batch(config.model, config.machine)
    if most < 1:
        raise SiliconError(
            f"not even one sequence of {config.model.context:,} tokens can be trained on this device: {fault}",
            where=config.sources.get("model.context", ""),
            fix="Choose a smaller --set model.context=... or another --device.",
        )
    if config.machine.micro_batch is None:
        size = values["machine.micro_batch"] = config.unmeasured_micro_batch(most)
        tokens = config.machine.micro_tokens
        yield Chosen("machine.micro_batch", size, f"not measured: at most {tokens:,} tokens at once")
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


def device_choices(machine: MachineConfig) -> list[Chosen]:
    """The device and dtype a run would take, with the reasons; what a self-test found broken is passed over."""
    opening = open_sound(machine)
    while True:
        try:
            next(opening)
        except StopIteration as stop:
            opened: Device = stop.value
            return opened.choices


# --- self-test -------------------------------------------------------------------------------------------------------


def self_test(device: str | None = None) -> Iterator[Tested]:
    """The device's arithmetic held against the CPU's, for every operation that training and sampling use."""
    place = open_device(_machine(device))
    for verdict in remembering(place, selftest_child.self_test(place)):
        error = verdict.error if math.isfinite(verdict.error) else None
        remedy = "" if verdict.passed else INSTEAD[verdict.needed]
        yield Tested(verdict.name, verdict.passed, error, verdict.limit, verdict.detail, remedy)


# --- probe-batch, profile --------------------------------------------------------------------------------------------


def probe_batch(request: Request, seconds: float = PROFILE_SECONDS) -> Iterator[Event]:
    """Micro-batches tried by real training steps; ends with the largest that fits."""
    config, device = yield from _shape(request)
    config = yield from gated(config, device)
    deadline = time.monotonic() + seconds
    search = yield from searching(settle(config, device), device, deadline)
    yield from search.run(largest)
    if not search.fitting and search.rows and search.rows[-1].verdict in FAILURES:
        raise untrainable(search.rows[-1], device)
    if not search.fitting:
        raise SiliconError(
            f"not even a micro-batch of 1 trains here: {search.limit}",
            fix="Choose a smaller --preset, or --set model.context=... .",
            kind="out_of_memory",
        )
    best, quickest = search.fitting[-1], max(search.fitting, key=lambda row: row.tokens_per_s)
    reason = f"the largest that fits, with {best.memory / 1e9:.2f} GB"
    if search.limit:
        reason += f"; {search.ceiling}: {search.limit}"
    yield Chosen("machine.micro_batch", best.micro_batch, reason)
    if quickest.tokens_per_s > best.tokens_per_s:
        yield Notice(f"{quickest.micro_batch} was the fastest of these; silicon profile looks for speed")


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
    yield from _measured(config, device, seconds)


def export_profile(request: Request, target: Path) -> Iterator[Event]:
    """Write the profile measured for a request to a file of its own, which `--profile FILE` accepts."""
    config, device = yield from _shape(request)
    if target.suffix != ".toml":
        raise SiliconError(
            f"--export {target}: the file's name must end with .toml", fix=f"Type --export {target}.toml."
        )
    if not target.parent.is_dir():
        raise SiliconError("no such folder", where=str(target.parent), fix="Make it first, or choose another one.")
    if target.exists():
        raise SiliconError("there is a file already", where=str(target), fix="Choose another name for --export.")
    found, trouble = profiles.cached(config, device)
    if found is None:
        why = trouble or "nothing is measured yet for this model on this machine"
        raise SiliconError(why, fix="Type silicon profile with the same options first.", kind="missing_input")
    yield Notice(f"written: {profiles.export(found, target)}")


def list_profiles(device: str | None = None) -> list[dict[str, Any]]:
    """A row for every measured profile, and whether it is for this machine as it is now."""
    place = open_device(_machine(device))
    return list(profiles.all_profiles(profiles.machine_mark(place)))


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
    if config.machine.micro_batch:
        where, fix = config.sources["machine.micro_batch"], "Leave it out: it is what is measured."
        raise SiliconError(f"machine.micro_batch = {config.machine.micro_batch}", where=where, fix=fix)
    device = yield from open_sound(config.machine)
    device.check_model(config.model)
    return config, device


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(request: Request, refresh: bool = False) -> Iterator[Event]:
    """For each shape of the ladder what it would reach in the request's time on this machine; one is chosen."""
    if not _seconds_of(resolve_request(request, None)):
        raise SiliconError("a plan needs a time", fix="Type --time 30m or --until 07:00.", kind="usage")
    with (yield from find_data(request)) as dataset:
        yield from _planned(request, dataset, refresh)


def _shaped(request: Request, dataset: Dataset) -> Generator[Event, None, tuple[Request, float]]:
    """The request with a shape in it: by a plan where a time is given and nothing says which model to train in it.

    With it the tokens/s that the plan measured, 0 where there is no plan.
    """
    given = [*configs.parse_assignments(request.assignments).values]
    if request.profile not in ("auto", "none"):
        given += configs.read_profile(request.profile).values
    named = request.preset is not None or any(name.startswith("model.") for name in given)
    if named or not _seconds_of(resolve_request(request, None)):
        return request, 0.0
    return (yield from _planned(request, dataset))


def _planned(
    request: Request, dataset: Dataset, refresh: bool = False
) -> Generator[Event, None, tuple[Request, float]]:
    """The request with the plan's shape in it, and the tokens/s that were measured for it."""
    asked = resolve_request(request, dataset)
    if asked.machine.micro_batch:
        fix = "Say which model with --preset, or leave the micro-batch (--profile, --set) out."
        raise SiliconError("a plan chooses the micro-batch itself", fix=fix)
    seconds = _seconds_of(asked)
    device = yield from open_sound(asked.machine)
    card = dataset.card["splits"]["val"]
    task = planner.Task(seconds, dataset.train.count, card["tokens"], dataset.val_bytes_per_token)

    def configure(rung: planner.Rung, per_step: int) -> RunConfig:
        return within(resolve_request(replace(request, shape=rung.layer(per_step)), dataset), device)

    best, rung = yield from planner.plan(device, task, configure, refresh)
    values = dict(rung.layer(best.tokens_per_step).values)
    if seconds < UNPROFILED_SECONDS:
        values["machine.micro_batch"] = best.micro_batch
    speed = "measured" if best.measured else "estimated"
    yield Chosen(
        "model",
        f"{rung.name} ({best.parameters / 1e6:.2g} M parameters)",
        f"predicted val_loss {best.val_loss:.2f} after {best.tokens / 1e6:.3g} M tokens, {best.passes:.2g} passes over "
        f"the data ({best.tokens_per_s:,.0f} tokens/s {speed}); --preset overrules",
    )
    return replace(request, shape=Layer(f"plan {rung.name}", values)), best.tokens_per_s if best.measured else 0.0


def _seconds_of(config: RunConfig) -> float:
    """The seconds of a time budget, or until its deadline; 0 for other budgets."""
    until = config.train.until
    return (until - datetime.now(UTC)).total_seconds() if until else config.train.time or 0.0


# --- train, resume ---------------------------------------------------------------------------------------------------


def forecast(request: Request) -> Iterator[Event | RunConfig]:
    """What `train` would do: the settings (a RunConfig), the run's shape (a Started) and its needs (a Foreseen).

    Nothing is measured but what a plan needs to name a model.
    """
    deadline = resolve_request(request, None).train.until
    with (yield from find_data(request)) as dataset:
        choices: list[Chosen] = []
        request, planned = yield from _gathering(_shaped(request, dataset), choices)
        tuned, tokens_per_s = yield from _gathering(tune(request, dataset, dry=True), choices)
        tokens_per_s = tokens_per_s or planned
        config = _by_the_clock(tuned, deadline)
        training_stream(dataset, config.model.context, config.data, config.train.seed)
        yield config
        device = open_device(config.machine)
        budget = Budget.of(config.train, deadline=deadline)
        yield _started(config, "(dry run)", "", dataset, device, choices, budget)
        yield from _tell_disk(config)
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


def _tell_disk(config: RunConfig) -> Iterator[Notice]:
    """Warn where the disk cannot hold the checkpoints of a run."""
    need, free = kept_bytes(config), disk_free(runs_folder())
    if free is not None and need > free:
        room = f"its checkpoints may take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {runs_folder()}"
        yield Notice(f"the disk may fill up: {room} (fewer are kept with --set train.keep=2)", "warning")


def _by_the_clock(config: RunConfig, deadline: datetime | None) -> RunConfig:
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
        request, planned = yield from _gathering(_shaped(request, dataset), choices)
        base = _by_the_clock(resolve_request(request, dataset), deadline)
        Budget.of(base.train)
        training_stream(dataset, base.model.context, base.data, base.train.seed)  # refuse at once what cannot be cut
        dataset.verify()  # damaged data is refused before a run takes its name
        tuned, tokens_per_s = yield from _gathering(tune(request, dataset), choices)
        tokens_per_s = tokens_per_s or planned
        config = _by_the_clock(tuned, deadline)
        yield from _tell_disk(config)
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
            yield from _logged(run, _run(run, config, dataset, stop, choices=choices))


def _gathering(work: Generator[Event, None, T], choices: list[Chosen]) -> Generator[Event, None, T]:
    """Pass events on and keep the choices among them."""
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            return stop.value
        if isinstance(event, Chosen):
            choices.append(event)
        yield event


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
        config = yield from _without_choices(_moved(config))
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
        with _dataset_of(config, about) as dataset:
            dataset.verify()
            if about.get("data") != dataset.fingerprint:
                raise other_data(str(dataset.path))
            yield from _logged(run, _run(run, config, dataset, stop, checkpoint, base=base, extend=extend))


def _without_choices(work: Generator[Event, None, T]) -> Generator[Event, None, T]:
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            return stop.value
        if not isinstance(event, Chosen):
            yield event


def _moved(config: RunConfig) -> Generator[Event, None, RunConfig]:
    """The config of a run that goes on, maybe on another device, within what the device can do."""
    place = yield from open_sound(config.machine)
    place.check_model(config.model)
    most, _ = place.largest_micro_batch(config.model, config.machine)
    if (config.machine.micro_batch or 1) > most:
        config = config.model_copy(update={"machine": config.machine.model_copy(update={"micro_batch": None})})
    return (yield from _fill_machine(config, place))


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
    budget, news = _budget(made_for, about), None
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
    with _telling_out_of_memory(NO_ROOM):
        yield from conversation.ask(question)


def _budget(config: RunConfig, about: Mapping[str, Any]) -> Budget:
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


# --- finetune --------------------------------------------------------------------------------------------------------

TUNING = {"data.document_mask": True, "optim.lr": 3e-3, "optim.matrix_lr": 0.01}  # lower rates than a base's
EPOCHS = 3


def finetune(
    request: Request,
    base: str | None = None,
    data: str = BUILTIN_CHAT,
    template: str | None = None,
    epochs: float | None = None,
    name: str | None = None,
    stop: Stop = lambda: None,
) -> Iterator[Event]:
    """Go on training a model on conversations, whose answers alone are learned, or on text: a new run.

    `data` is a prepared dataset, or what `prepare` takes, which is then prepared with the model's tokenizer. Without a
    budget it is read three times.
    """
    if name:
        check_new_run(name)
    opened = yield from open_model(base)
    folder = yield from _tuning_data(opened, data, template)
    with open_dataset(folder) as dataset:
        _check_tokenizer(dataset, opened)
        shape = opened.model.config.model_dump() | {"dropout": 0.0}
        origin = Layer(f"base {opened.name}", {f"model.{key}": value for key, value in shape.items()} | TUNING)
        request = replace(request, data=folder, shape=_with_steps(origin, opened, dataset, request, epochs))
        base_config = resolve_request(request, dataset)
        deadline = base_config.train.until
        Budget.of(_by_the_clock(base_config, deadline).train)
        dataset.verify()
        choices: list[Chosen] = []
        tuned, tokens_per_s = yield from _gathering(tune(request, dataset), choices)
        config = _by_the_clock(tuned, deadline)
        yield from _tell_disk(config)
        about: dict[str, Any] = {"dataset": str(dataset.path), "data": dataset.fingerprint, "preset": opened.name}
        about |= {"from": opened.name, "from_path": str(opened.path), "from_sha256": sha256(opened.weights)}
        about |= {"stage": "chat" if dataset.is_chat else "text"}
        about |= {"deadline": deadline} if deadline else {}
        about |= {"tokens_per_s": tokens_per_s} if tokens_per_s else {}
        run = create_run(name or free_run_name(f"{opened.name}-{dataset.name}"), config, about)
        with run.lock():
            yield from _logged(run, _run(run, config, dataset, stop, choices=choices, base=opened.model))


def _tuning_data(opened: Opened, data: str, template: str | None) -> Generator[Event, None, str]:
    """The folder of a prepared dataset, or of one that is prepared now for a model."""
    if data in datasets() or (Path(data).expanduser() / "dataset.json").is_file():
        with open_dataset(data) as dataset:
            if template is None and dataset.tokenizer.sha256 == opened.tokenizer.sha256:
                return str(dataset.path)
    word = open_template(opened.tokenizer, template, read_template(opened.path))
    if data != BUILTIN_CHAT:
        record_files(Path(data).expanduser())
    folder = ""
    for event in prepare_chat([data], dataset_name([data]), word, marked=True):
        if isinstance(event, Prepared):
            folder = event.path
            yield Notice(f"conversations are prepared for {opened.name}: {folder}")
        else:
            yield event
    return folder


def _with_steps(origin: Layer, opened: Opened, dataset: Dataset, request: Request, epochs: float | None) -> Layer:
    """The layer of a base with steps for so many passes over the data in it."""
    config = resolve_request(replace(request, shape=Layer(origin.source, {**origin.values, "train.steps": 1})), dataset)
    rows = training_stream(dataset, config.model.context, config.data, config.train.seed).windows
    steps = max(1, math.ceil((epochs or EPOCHS) * rows / config.sequences_per_step))
    return Layer(origin.source, {**origin.values, "train.steps": steps})


def _check_tokenizer(dataset: Dataset, opened: Opened) -> None:
    if dataset.tokenizer.sha256 != opened.tokenizer.sha256:
        raise SiliconError(
            f"dataset {dataset.name} was made with another tokenizer than the model's",
            fix=f"Prepare it with --tokenizer {shlex.quote(str(opened.path / 'tokenizer.json'))}.",
        )


def _base_of(about: Mapping[str, Any]) -> Decoder | None:
    """The model that a tuned run begins with, which must still be what it was; None for a run from nothing."""
    if "from_path" not in about:
        return None
    folder = Path(about["from_path"])
    return read_model(folder, about["from_sha256"])[0]


# --- using a model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """A model ready to use, and the run it came from (None for a folder that is no run of ours)."""

    model: Decoder
    tokenizer: Tokenizer
    run: RunFolder | None
    step: int
    path: Path

    @property
    def name(self) -> str:
        return self.run.name if self.run else self.path.name

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def template(self, word: str | None = None) -> Template:
        """How it was taught to talk; SiliconError where it was not."""
        own = read_template(self.path)
        if word is None and own is None:
            what = f"{self.run.name if self.run else self.path} was not tuned on conversations"
            fix = f"Type silicon finetune{f' {self.run.name}' if self.run else ''} --data {BUILTIN_CHAT} first."
            raise SiliconError(what, fix=fix, kind="missing_input")
        return open_template(self.tokenizer, word, own)


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


def _machine(device: str | None) -> MachineConfig:
    """The machine's settings where only a device can be asked for."""
    return configs.resolve(Layer("--device", {"machine.device": device})).machine


def sample(
    prompt: str, name: str | None, settings: SampleConfig, device: str | None = None, step: int | str | None = None
) -> Iterator[Event]:
    """Continue a prompt with a trained model; streams pieces of text."""
    opened = yield from open_model(name, step)
    check_prompt(opened.tokenizer, prompt)
    place = yield from open_sound(_machine(device), "cached_decoding", *features_of(opened.model.config))
    seed = settings.seed if settings.seed is not None else secrets.randbits(32)
    with _telling_out_of_memory(NO_ROOM):
        opened.model.to(place.torch_device)
        yield from generate(opened.model, opened.tokenizer, place, prompt, settings, seed)


def talk(
    name: str | None,
    settings: SampleConfig,
    device: str | None = None,
    step: int | str | None = None,
    template: str | None = None,
) -> Generator[Event, None, Talk]:
    """A conversation with a model that was taught to talk."""
    opened = yield from open_model(name, step)
    word = opened.template(template)
    place = yield from open_sound(_machine(device), "cached_decoding", *features_of(opened.model.config))
    seed = settings.seed if settings.seed is not None else secrets.randbits(32)
    with _telling_out_of_memory(NO_ROOM):
        return Talk(opened.model.to(place.torch_device), word, place, settings, seed)


def validate(
    name: str | None, data: str | None = None, device: str | None = None, step: int | str | None = None
) -> Iterator[Event]:
    """Loss of a model on the whole validation split of its dataset (or of another with the same tokenizer)."""
    opened = yield from open_model(name, step)
    if data:
        dataset = open_dataset(data)
    elif opened.run:
        dataset = _dataset_of(*opened.run.config())
    else:
        raise SiliconError("a model folder has no dataset of its own", fix="Type --data NAME.", kind="missing_input")
    place = yield from open_sound(_machine(device), *features_of(opened.model.config))
    with dataset, _telling_out_of_memory(NO_ROOM):
        dataset.val.verify()
        _check_tokenizer(dataset, opened)
        context = opened.model.config.context
        windows, batch = validation(dataset, context, _data_config(opened)), evaluation_batch(context)
        model = opened.model.to(place.torch_device)
        result = yield from evaluate(model, dataset, windows, place, batch, opened.step)
        results = itertools.chain([result], _scores(opened, dataset, place))
        # What is found on other data says nothing that the run's own records could be held against.
        yield from results if data else _recorded(opened, results)


def measure_tasks(
    name: str | None,
    tasks: Sequence[str],
    limit: int | None = None,
    device: str | None = None,
    step: int | str | None = None,
) -> Iterator[Event]:
    """A model on tasks of lm-evaluation-harness."""
    opened = yield from open_model(name, step)
    place = yield from open_sound(_machine(device), "cached_decoding", *features_of(opened.model.config))
    with _telling_out_of_memory(NO_ROOM):
        model = opened.model.to(place.torch_device)
        yield from _recorded(opened, measure(model, opened.tokenizer, place, tasks, opened.step, limit))


def _recorded(opened: Opened, events: Iterable[Event]) -> Iterator[Event]:
    """Pass results on, and note them in the run that the model is of, for its report."""
    noting = opened.run is not None
    for event in events:
        if noting and opened.run and not isinstance(event, Working):
            try:
                opened.run.record(event)
            except OSError as error:
                noting = False
                yield Notice(f"not noted in the run: {error.strerror}", "warning")
        yield event


def export_folder(name: str | None, target: Path) -> Iterator[Event]:
    """A model as a Hugging Face folder of its own: config, tokenizer, chat template and weights."""
    opened = yield from open_model(name)
    with staged_folder(target, replace=True) as stage:
        for file in sorted(opened.path.iterdir()):
            if file.name in (*MODEL_FILES, TEMPLATE_FILE, "tokenizer_config.json", "generation_config.json"):
                copy_file(file, stage / file.name)
    yield Notice(f"exported: {target}")


def _data_config(opened: Opened) -> DataConfig:
    """How documents were kept apart when the model was trained."""
    return opened.run.config()[0].data if opened.run else DataConfig(document_mask=True)


def _scores(opened: Opened, dataset: Dataset, device: Device) -> Iterator[Event]:
    """How many held-out questions of each task the model answers to the letter."""
    if not dataset.is_chat:
        return
    template = Template(dataset.card["template"], dataset.tokenizer)
    for task, questions in read_questions(dataset).items():
        begun = time.perf_counter()
        prompts = [template.prompt(asked[:-1]) for asked in questions]
        right = 0
        for done, (number, text) in enumerate(
            answers(opened.model, opened.tokenizer, device, prompts, template.ends), 1
        ):
            right += text.strip() == questions[number][-1].content.strip()
            yield Working(task, done, len(questions), "questions")
        yield Scored(opened.step, task, right, len(questions), round(time.perf_counter() - begun, 3))


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
        "budget": _budget(config, about).describe(),
        "val_loss": evaluated["val_loss"] if evaluated else None,
        "val_bpb": evaluated["val_bpb"] if evaluated else None,
        "state": "running" if run.in_use() else "done" if reason == "done" else reason,
        "written": log[-1]["at"] if log else None,
    }
