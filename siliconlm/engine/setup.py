"""From what was asked for to a config: data, device, and settings measured on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from siliconlm import config as configs
from siliconlm.config import Layer, MachineConfig, RunConfig
from siliconlm.data.dataset import Dataset, datasets, open_dataset
from siliconlm.data.prepare import prepare
from siliconlm.data.sources import BUILTIN
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import (
    Chosen,
    Event,
    Notice,
)
from siliconlm.hardware.device import (
    Device,
    is_out_of_memory,
    lacks_compiler,
    plain_words,
)
from siliconlm.hardware.facts import processor_share
from siliconlm.model.families import family_of
from siliconlm.tuning import profiles
from siliconlm.tuning.choose import PROFILE_SECONDS, make_profile
from siliconlm.tuning.verdicts import gated, open_sound, tested

DEFAULT_PRESET = "tiny"
TOO_MUCH = "Train under another --name with a smaller --set machine.micro_batch=... or --preset; checkpoints are whole."
BUSY = 0.25  # of the processor, taken by other programs: measurements then tell little
NO_ROOM = "Close what else uses memory, or choose another --device."
Stop = Callable[[], str | None]
T = TypeVar("T")


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
        return (yield from fill_machine(base, device)), 0.0
    found, trouble = profiles.cached(base, device)
    if trouble:
        yield Notice(trouble, "warning")
    if found is None and dry:
        yield Notice("no profile is cached for this model on this machine; training would measure one first")
        return (yield from fill_machine(base, device)), 0.0
    if found is None:
        yield Notice(f"measuring this machine once for this model (about {PROFILE_SECONDS:.0f} s)")
        found = yield from measured(base, device, PROFILE_SECONDS)
    else:
        yield from found.choices
    tuned = resolve_request(request, dataset, found.layer())
    device = yield from open_sound(tuned.machine)
    return (yield from fill_machine(tuned, device, found.choices)), found.tokens_per_s


def measured(config: RunConfig, device: Device, seconds: float) -> Generator[Event, None, profiles.Profile]:
    """A profile measured now and kept. The device's arithmetic is tested before, if it never was."""
    device = yield from tested(device, config.machine)
    config = yield from gated(config, device)
    if (busy := processor_share()) > BUSY:
        yield Notice(f"other programs take {busy:.0%} of the processor: the figures will be low", "warning")
    made = yield from make_profile(config, device, seconds)
    yield Notice(f"profile kept in {profiles.store(made)}")
    return made


def fill_machine(config: RunConfig, device: Device, told: Sequence[Chosen] = ()) -> Generator[Event, None, RunConfig]:
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


def gathering(work: Generator[Event, None, T], choices: list[Chosen]) -> Generator[Event, None, T]:
    """Pass events on and keep the choices among them."""
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            return stop.value
        if isinstance(event, Chosen):
            choices.append(event)
        yield event


def without_choices(work: Generator[Event, None, T]) -> Generator[Event, None, T]:
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            return stop.value
        if not isinstance(event, Chosen):
            yield event


@contextmanager
def telling_out_of_memory(fix: str) -> Iterator[None]:
    """Memory that runs out is something the user can mend: an error that says how, not a traceback."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SiliconError(f"out of memory: {plain_words(error)}", fix=fix, kind="out_of_memory") from None


def machine_of(device: str | None) -> MachineConfig:
    """The machine's settings where only a device can be asked for."""
    return configs.resolve(Layer("--device", {"machine.device": device})).machine
