"""Which model to train in a given time: a ladder of shapes, their speed here, and the loss that each would reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from siliconlm.config import Layer, ModelConfig, RunConfig, read_toml
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Planned
from siliconlm.files import home, write_file
from siliconlm.hardware.device import Device
from siliconlm.model.decoder import count_parameters
from siliconlm.training.checkpoint import checkpoint_bytes
from siliconlm.training.loop import SAVE_SPEED, evaluation_seconds
from siliconlm.training.schedule import Budget
from siliconlm.tuning.choose import settle
from siliconlm.tuning.probe import probe, rate
from siliconlm.tuning.profiles import file_name, fingerprint, machine_mark
from siliconlm.tuning.search import SHORTEST_LIMIT, between

SMALLEST_STEP = 2048  # tokens of an optimiser step
STEP_GROWS_FROM = 2e6  # tokens of a run
BEGIN_WITH = "4x128"  # the rung measured first
MEASURED = 3  # rungs at least, between which the others are interpolated
PROBE_SECONDS = 60.0  # longest for one rung


@dataclass(frozen=True, slots=True)
class Rung:
    """One shape of the ladder. Presets stand on it too."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.n_layer}x{self.n_embd}"

    def layer(self, tokens_per_step: int) -> Layer:
        """The rung's settings, to be laid over the defaults."""
        shape = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_ff", "context")
        values = {f"model.{name}": getattr(self, name) for name in shape}
        return Layer(f"plan {self.name}", values | {"train.tokens_per_step": tokens_per_step})


# Each about twice as many parameters as the one before. Heads are 64 wide where the width allows it: Apple's fused
# kernels know that size.
LADDER = (
    Rung(2, 32, 1, 1, 32, 128, 128),
    Rung(2, 64, 1, 1, 64, 256, 128),
    Rung(4, 64, 1, 1, 64, 256, 128),
    Rung(4, 96, 3, 1, 32, 384, 128),
    Rung(4, 128, 2, 1, 64, 512, 128),
    Rung(4, 192, 3, 1, 64, 768, 128),
    Rung(5, 256, 4, 2, 64, 768, 256),
    Rung(6, 384, 6, 3, 64, 1024, 256),
    Rung(8, 448, 7, 1, 64, 1216, 512),
    Rung(12, 512, 8, 4, 64, 1536, 512),
    Rung(14, 640, 10, 5, 64, 1728, 1024),
    Rung(16, 768, 12, 4, 64, 2048, 1024),
)

BEGIN_AT = [rung.name for rung in LADDER].index(BEGIN_WITH)


def step_tokens(rung: Rung, tokens: float) -> int:
    """Tokens of an optimiser step for a run of so many tokens: a power of two that grows with their square root.

    The batch that wastes nothing grows as the loss falls (McCandlish et al. 2018), about as the root of the tokens.
    """
    wanted = SMALLEST_STEP * math.sqrt(max(1.0, tokens / STEP_GROWS_FROM))
    return max(rung.context, 2 ** int(math.log2(wanted)))


@dataclass(frozen=True, slots=True)
class LossModel:
    """Validation loss in nats per byte of a trained model: floor + a / size^alpha + b / worth^beta.

    `size` is parameters outside the embedding. Tokens that are seen again are worth less each time: `patience` is the
    number of passes after which they are worth 1/e (Muennighoff et al. 2023, arXiv 2305.16264, equation 5; the rest
    is Hoffmann et al. 2022, arXiv 2203.15556).
    """

    floor: float
    size_factor: float
    alpha: float
    token_factor: float
    beta: float
    patience: float

    def worth(self, tokens: float, unique: float) -> float:
        """Fresh tokens that would teach as much as `tokens` out of `unique` different ones."""
        if tokens <= unique:
            return tokens
        repeats = tokens / unique - 1
        return unique * (1 + self.patience * (1 - math.exp(-repeats / self.patience)))

    def loss(self, size: float, tokens: float, unique: float) -> float:
        worth = max(1.0, self.worth(tokens, unique))
        return self.floor + self.size_factor * size**-self.alpha + self.token_factor * worth**-self.beta


# Fitted by benchmarks/fit_plan.py to the runs in benchmarks/results/plan_sweep.jsonl.
FITTED = LossModel(1.0978, 8.9366, 0.3, 186.24, 0.45, 5.0)


@dataclass(frozen=True, slots=True)
class Task:
    """What there is to train on and for how long. `bytes_per_token` makes losses of other tokenizers comparable."""

    seconds: float
    train_tokens: int
    val_tokens: int
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What a rung takes on this machine: seconds of both passes per token, seconds of an update, bytes at the peak."""

    pass_seconds: float
    update_seconds: float
    memory: int


Configure = Callable[[Rung, int], RunConfig]
"""A rung and its tokens per step -> the whole config of a run."""


def plan(
    device: Device, task: Task, configure: Configure, refresh: bool = False
) -> Generator[Event, None, tuple[Planned, Rung]]:
    """The rung with the lowest predicted loss among those that fit; yields the probes, then a Planned for every rung.

    The rungs that matter are measured, each once on a machine (`refresh` measures again); the speed of the others
    lies between. SiliconError when nothing fits.
    """
    budget = device.memory_budget()
    usable = ladder(configure)
    file = speeds_file(device, configure(usable[0], max(SMALLEST_STEP, usable[0].context)))
    known = {} if refresh else read_speeds(file)
    seconds = min(PROBE_SECONDS, max(SHORTEST_LIMIT, task.seconds))
    measured = 0
    while True:
        rows = [_planned(rung, known, device, task, configure) for rung in usable] if known else []
        fitting = [row for row in rows if row.memory <= budget]
        wanted = _to_measure(usable, fitting) if fitting or not rows else None
        if wanted is None:
            break
        if not measured:
            yield Notice("measuring model sizes on this machine, once; some seconds each")
        measured += 1
        config = settle(configure(wanted, step_tokens(wanted, STEP_GROWS_FROM)), device)
        config = config.replace("plan", **{"machine.micro_batch": config.unmeasured_micro_batch()})
        tried = probe(config, device, budget, seconds)
        yield replace(tried, variant=", ".join(word for word in (wanted.name, tried.variant) if word))
        if tried.verdict != "fits":  # nor will a larger one
            usable = usable[: usable.index(wanted)]
            if not usable:
                raise _nothing_trains(tried.verdict, tried.reason)
            continue
        per_token = tried.forward_seconds / (tried.micro_batch * tried.context)
        known[wanted.name] = Speed(per_token, tried.update_seconds, tried.memory)
        keep_speeds(file, device, known)
    if not fitting:
        raise _nothing_trains("too big", f"the memory budget is {budget / 1e9:.1f} GB")
    best = min(fitting, key=lambda row: row.val_loss)
    for row in rows:
        yield replace(row, chosen=True) if row is best else row
    return best, next(rung for rung in LADDER if rung.name == best.rung)


def ladder(configure: Configure) -> list[Rung]:
    """The rungs that go together with what is set by hand, each model once. SiliconError when none does."""
    usable: dict[ModelConfig, Rung] = {}
    refused: SiliconError | None = None
    for rung in LADDER:
        try:
            config = configure(rung, max(SMALLEST_STEP, rung.context))
        except SiliconError as error:
            refused = error
        else:
            usable.setdefault(config.model, rung)
    if refused and not usable:
        raise refused
    return list(usable.values())


def _nothing_trains(verdict: str, reason: str) -> SiliconError:
    what = f"not even the smallest model of the ladder can be trained here: {reason}"
    if verdict == "too big":
        return SiliconError(what, fix="Close other programs, or choose another --device.", kind="out_of_memory")
    return SiliconError(what, fix="Type silicon doctor --self-test.", kind="training_failed")


def _to_measure(usable: list[Rung], fitting: list[Planned]) -> Rung | None:
    """The next rung to measure: the best by what is known until that one is measured, then its best neighbour."""
    by_name = {rung.name: rung for rung in usable}
    if not fitting:
        return by_name.get(BEGIN_WITH, usable[min(len(usable) - 1, BEGIN_AT)])
    best = sorted(fitting, key=lambda row: row.val_loss)[:MEASURED]
    return next((by_name[row.rung] for row in best if not row.measured), None)


def _planned(rung: Rung, known: dict[str, Speed], device: Device, task: Task, configure: Configure) -> Planned:
    """What a rung would reach in the time of a task."""
    speed = known.get(rung.name) or _between(rung, known, configure)
    per_step = SMALLEST_STEP
    for _ in range(3):  # tokens per step depend on the tokens of the run, which depend on them a little
        config = configure(rung, max(per_step, rung.context))
        seconds = config.model.context * speed.pass_seconds
        tokens_per_s = rate(config, 1, seconds, speed.update_seconds)
        evaluating = evaluation_seconds(config, task.val_tokens, Budget(None, task.seconds), tokens_per_s)
        saving = checkpoint_bytes(config) / SAVE_SPEED
        tokens = tokens_per_s * max(0.0, task.seconds - evaluating - saving)
        per_step = step_tokens(rung, tokens)
    parameters = count_parameters(config.model)
    loss = FITTED.loss(
        parameters - config.model.vocab_size * config.model.n_embd,
        tokens * task.bytes_per_token,
        task.train_tokens * task.bytes_per_token,
    )
    return Planned(
        rung=rung.name,
        parameters=parameters,
        context=config.model.context,
        tokens_per_step=config.train.tokens_per_step,
        micro_batch=config.unmeasured_micro_batch(),
        tokens_per_s=tokens_per_s,
        measured=rung.name in known,
        tokens=round(tokens),
        passes=tokens / task.train_tokens,
        memory=speed.memory,
        val_loss=min(loss * task.bytes_per_token, math.log(config.model.vocab_size)),  # as before any training
    )


def _between(rung: Rung, known: dict[str, Speed], configure: Configure) -> Speed:
    """What a rung takes, by the two nearest that are measured: its times in proportion on a logarithmic scale of
    parameters, its memory on a plain one, for a part of that is the same for all."""

    def parameters(name: str) -> int:
        other = next(other for other in LADDER if other.name == name)
        return count_parameters(configure(other, other.context).model)

    def place(name: str) -> float:
        return math.log(parameters(name))

    here = place(rung.name)
    near = sorted(known, key=lambda name: abs(place(name) - here))[:2]
    memory = between({parameters(name): known[name].memory for name in known}, parameters(rung.name))

    def read(value: Callable[[Speed], float]) -> float:
        first = math.log(value(known[near[0]]))
        slope = 0.9  # where only one is known: a little less than in proportion to the parameters
        if len(near) == 2:
            slope = (math.log(value(known[near[1]])) - first) / (place(near[1]) - place(near[0]))
        return math.exp(first + slope * (here - place(near[0])))

    return Speed(
        read(lambda speed: speed.pass_seconds),
        read(lambda speed: speed.update_seconds),
        round(max(memory, min(speed.memory for speed in known.values()))),
    )


# --- what was measured before ----------------------------------------------------------------------------------------


def speeds_file(device: Device, smallest: RunConfig) -> Path:
    """Speeds depend on the machine and on all that is set by hand, given the smallest rung's config."""
    by_hand = {
        name: getattr(smallest.model, name.removeprefix("model."))
        for name, source in smallest.sources.items()
        if name.startswith("model.") and not source.startswith("plan ")
    }
    mark = {"shape_by_hand": by_hand, "micro_tokens": smallest.machine.micro_tokens}
    return home() / "speeds" / file_name(fingerprint(smallest, device) | mark)


def read_speeds(path: Path) -> dict[str, Speed]:
    """What was measured of the ladder on this machine. A damaged file counts as none: it is measured again."""
    if not path.is_file():
        return {}
    try:
        found = {name: Speed(**values) for name, values in read_toml(path)["speeds"].items()}
        whole = found.keys() <= {rung.name for rung in LADDER}
        return found if whole and all(min(astuple(speed)) > 0 for speed in found.values()) else {}
    except (SiliconError, KeyError, TypeError, AttributeError):
        return {}


def keep_speeds(path: Path, device: Device, known: dict[str, Speed]) -> None:
    tables: dict[str, Any] = {"speeds": {name: asdict(speed) for name, speed in known.items()}}
    write_file(path, tomli_w.dumps({"machine": machine_mark(device), **tables}))
