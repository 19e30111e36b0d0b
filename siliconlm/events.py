"""The records that long work yields. They go up: log.jsonl, the terminal and `--json` are readers of the same ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Event:
    """A plain record. `as_json` names it by its class in lower case: {"event": "saved", ...}."""

    def as_json(self) -> dict[str, Any]:
        return {"event": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something the user should know. A `warning` says that a wish was not, or may not be, met."""

    message: str
    level: Literal["note", "warning"] = "note"


@dataclass(frozen=True, slots=True)
class Working(Event):
    """How far a job without a loss curve has come (prepare, eval, download). `total` 0 means not known."""

    what: str
    done: int
    total: int
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Prepared(Event):
    """A dataset is on disk. `card` is its dataset.json."""

    name: str
    path: str
    card: dict[str, Any]
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Written(Event):
    """A dataset stands in the folder `path` as `files` of another program."""

    name: str
    format: str
    path: str
    files: list[str]


@dataclass(frozen=True, slots=True)
class Shown(Event):
    """A conversation as a model reads it: pieces of text, and whether each is learned."""

    place: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Probed(Event):
    """One setting tried by real training steps in a child process.

    Memory in bytes: `predicted` before the try (0: not forecast) and measured at the peak. `tokens_per_s` is of a whole
    optimiser step, which takes one `forward_seconds` (both passes) a micro-batch and one `update_seconds`. `burst` is
    tokens/s as the measurement began. `variant` says what differs from the plain step.
    """

    micro_batch: int
    context: int
    dtype: str
    memory: int
    tokens_per_s: float
    verdict: Literal["fits", "too big", "slower", "failed", "stopped"]
    reason: str = ""
    variant: str = ""
    predicted: int = 0
    forward_seconds: float = 0.0
    update_seconds: float = 0.0
    burst: float = 0.0


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """One shape of the ladder: what it would reach in the time, its speed `measured` here or between measured ones.

    Memory in bytes, `val_loss` in nats per token, a prediction. `passes` over the training data.
    """

    rung: str
    parameters: int
    context: int
    tokens_per_step: int
    micro_batch: int
    tokens_per_s: float
    measured: bool
    tokens: int
    passes: float
    memory: int
    val_loss: float
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Chosen(Event):
    """A setting decided by the tool, with its reason."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Tested(Event):
    """One check of the device's arithmetic. `error` is None where there was no number; `remedy` is for a failed one."""

    name: str
    passed: bool
    error: float | None
    limit: float
    detail: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Started(Event):
    """Training begins or goes on. `machine` says in words on what: chip, cores, memory, system, Python and torch."""

    run: str
    path: str
    dataset: str
    device: str
    parameters: int
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    context: int
    budget: str
    choices: list[Chosen] = field(default_factory=list)
    machine: str = ""


@dataclass(frozen=True, slots=True)
class Foreseen(Event):
    """What a run will need, by a dry run without data: bytes at the peak, and faults of the device it would meet.

    `tokens`, `passes` over the training split and `seconds` are None where they hang on a speed, `tokens_per_s`, that
    was not measured. `disk` is the most that its checkpoints take.
    """

    memory: int
    weights: int
    optimizer_state: int
    hazards: list[str] = field(default_factory=list)
    tokens: int | None = None
    passes: float | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    disk: int = 0
    disk_free: int | None = None


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """Training goes on from a checkpoint; log lines of later steps that stand above this one no longer count."""

    step: int
    checkpoint: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step(Event):
    """One optimiser step: loss in nats per token before the update. On a CPU these lines repeat bit for bit."""

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """What was measured since the last one. Memory in bytes, times in seconds, `done` from 0 to 1."""

    step: int
    tokens: int
    loss: float
    tokens_per_s: float
    memory: int
    done: float
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """Validation: nats per token and bits per byte. `complete` says whether the whole split was used."""

    step: int
    val_loss: float
    val_bpb: float
    tokens: int
    complete: bool
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Scored(Event):
    """Exact matches of a model's answers on a task's held-out questions."""

    step: int
    task: str
    correct: int
    total: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured(Event):
    """A metric of a task of lm-evaluation-harness, over `total` questions."""

    step: int
    task: str
    metric: str
    value: float
    total: int


@dataclass(frozen=True, slots=True)
class Example(Event):
    """What the model wrote, for the report."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """A checkpoint is durable on disk."""

    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """Training ended. `reason`: done, or the name of the signal that stopped it.

    `complete` says whether the last evaluation used the whole validation split.
    """

    run: str
    path: str
    step: int
    tokens: int
    seconds: float
    reason: str
    val_loss: float | None
    val_bpb: float | None
    complete: bool
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Staged(Event):
    """A stage of a road begins or ends. `states` holds every stage: waiting, running, done or stopped."""

    road: str
    stage: str
    states: dict[str, str]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Serving(Event):
    """A server answers at `url`. `rows` texts are made at once; `chat` says whether the model was taught to talk."""

    url: str
    model: str
    device: str
    context: int
    rows: int
    chat: bool


@dataclass(frozen=True, slots=True)
class Sampled(Event):
    """A piece of text as it is made; `done` on the last piece of a sample, with the counts.

    `seconds` have passed since the first sample began: several are made at once.
    """

    text: str
    sample: int
    done: bool = False
    tokens: int = 0
    seconds: float = 0.0
    stopped_by: str = ""
