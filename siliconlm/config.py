"""Every setting, written once: name, type, bounds, default, help. Layers of them resolve to one frozen `RunConfig`."""

from __future__ import annotations

import difflib
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from siliconlm.errors import SiliconError, nearest
from siliconlm.files import home, write_file

TIME_FORM = "a time is written like 90s, 30m, 2h or 1h30m"
MOMENT_FORM = "a moment is written like 07:00 or 2026-11-22 07:00"
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
BUDGETS = ("train.steps", "train.tokens", "train.time", "train.until")
METADATA = {"sources", "about"}  # tables of a profile that are not settings
LONGEST_CONTEXT = 1 << 20
COLDEST = 1e-3  # divided by less, logits overflow


def seconds(text: object) -> float:
    """A duration in seconds out of `90`, `90s`, `30m`, `2h`, `1h30m`, `1d`. ValueError for everything else."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        try:
            return float(text)
        except OverflowError:  # TOML has integers of any size
            return math.inf
    if not isinstance(text, str):  # TOML reads 00:10:00 as a time of day
        raise ValueError(TIME_FORM)
    parts = re.fullmatch(r"\s*(?:([\d.]+)d)?\s*(?:([\d.]+)h)?\s*(?:([\d.]+)m)?\s*(?:([\d.]+)s?)?\s*", text)
    try:
        values = [float(part) * unit for part, unit in zip(parts.groups(), UNITS.values(), strict=True) if part]  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        values = []
    if not values:
        raise ValueError(TIME_FORM)
    return sum(values)


def duration(time: float) -> str:
    """1h30m for 5400: what `seconds` reads back, to the nearest second."""
    rest, words = round(time), ""
    for unit, size in UNITS.items():
        count, rest = divmod(rest, size)
        words += f"{count}{unit}" if count else ""
    return words or "0s"


def moment(text: object, now: datetime) -> datetime:
    """The next moment after `now` at which clocks here show `07:00`, or `2026-11-22 07:00`; aware, in local time.

    A time that comes twice, as clocks are put back, is the next of the two; one that is left out is as if they had
    not been put forward. An aware datetime stays as it is. ValueError for everything else, and for what is past.
    """
    if isinstance(text, datetime) and text.tzinfo:
        return text
    form = r"\s*(?:(\d{4}-\d\d-\d\d)[ T])?(\d\d?:\d\d)\s*"
    parts = re.fullmatch(form, text, re.ASCII) if isinstance(text, str) else None
    if not parts:
        raise ValueError(MOMENT_FORM)
    today = now.astimezone().date()
    try:
        days = [date.fromisoformat(parts[1])] if parts[1] else [today, today + timedelta(days=1)]
        clock = datetime.strptime(parts[2], "%H:%M").time()
        shown = [datetime.combine(day, clock.replace(fold=fold)).timestamp() for day in days for fold in (0, 1)]
    except (ValueError, OverflowError):
        raise ValueError(MOMENT_FORM) from None
    ahead = [time for time in shown if time > now.timestamp()]
    if not ahead:
        raise ValueError("it is past")
    return datetime.fromtimestamp(ahead[0], UTC).astimezone()


Duration = Annotated[float, BeforeValidator(seconds)]
Moment = Annotated[datetime, BeforeValidator(lambda text: moment(text, datetime.now(UTC)))]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def clash(what: str, fix: str, *settings: str) -> PydanticCustomError:
    """Settings that do not go together: an error that carries their dotted names, so that `resolve` can say
    where each came from."""
    return PydanticCustomError("clash", "{what}", {"what": what, "fix": fix, "settings": settings})


class ModelConfig(Section):
    """The decoder by features. The default features are Qwen3's; `siliconlm.model.families` names the others."""

    n_layer: int = Field(4, ge=1, le=1000, description="decoder blocks")
    n_embd: int = Field(128, ge=8, description="width of the residual stream")
    n_head: int = Field(4, ge=1, description="query heads")
    n_kv_head: int = Field(2, ge=1, description="key and value heads; fewer than n_head is grouped-query attention")
    head_dim: int = Field(32, ge=2, multiple_of=2, description="width of one head")
    n_ff: int = Field(384, ge=8, description="width inside the MLP")
    vocab_size: int = Field(0, ge=0, description="rows of the embedding; 0 takes the data's, padded to 64")
    context: int = Field(
        256, ge=2, le=LONGEST_CONTEXT, description="longest sequence, and the training sequence length, in tokens"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation before attention and MLP")
    position: Literal["rope", "learned"] = Field("rope", description="how positions enter")
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="the MLP's shape")
    qk_norm: bool = Field(True, description="RMSNorm of queries and keys per head (Qwen3)")
    bias: bool = Field(False, description="biases in linear layers (GPT-2)")
    tied: bool = Field(True, description="output head shares the embedding's weights")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norms")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of embedding, attention output and MLP output")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.n_head % self.n_kv_head:
            raise clash(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}",
                f"Choose model.n_kv_head from {', '.join(map(str, divisors(self.n_head)))}.",
                "model.n_head",
                "model.n_kv_head",
            )
        return self


class DataConfig(Section):
    name: str = Field("", description="a prepared dataset, by name or folder")
    packing: Literal["stream", "best_fit"] = Field(
        "stream", description="stream: rows cut from the text; best_fit: whole documents, as full rows as can be"
    )
    document_mask: bool = Field(False, description="documents in a row do not see each other")


class TrainConfig(Section):
    """The recipe. Nothing here may depend on the machine."""

    steps: int | None = Field(None, ge=1, description="budget in optimiser steps; a run needs one budget")
    tokens: int | None = Field(None, ge=1, description="budget in tokens")
    time: Duration | None = Field(None, gt=0, description="budget in wall time, final evaluation and save included")
    until: Moment | None = Field(None, description="budget by the clock: train until 07:00, or 2026-11-22 07:00")
    tokens_per_step: int = Field(4096, ge=2, description="tokens of one optimiser step, on every machine")
    schedule: Literal["wsd", "cosine", "constant"] = Field("wsd", description="learning rate over the budget")
    warmup: float = Field(0.02, ge=0, le=1, description="share of the budget spent warming up")
    decay: float = Field(0.8, ge=0, le=1, description="share of the budget spent decaying (wsd)")
    final_lr: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of its peak")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weights' moving average; 0 switches it off")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0 spreads up to 20 over the run")
    eval_tokens: int = Field(16_384, ge=1, description="validation tokens used during training; the end uses all")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0 saves every 5 minutes")
    keep: int = Field(3, ge=2, description="checkpoints kept besides the best")
    seed: int = Field(1, ge=0, lt=2**63, description="decides initial weights, data order and dropout")


class OptimConfig(Section):
    name: Literal["muon", "adamw"] = Field("muon", description="muon: Muon for matrices, AdamW for the rest")
    lr: float = Field(6e-3, gt=0, description="AdamW's peak learning rate")
    matrix_lr: float = Field(0.02, gt=0, description="Muon's peak learning rate")
    beta1: float = Field(0.8, ge=0, lt=1, description="AdamW's first moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second moment decay")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    momentum: float = Field(0.9, ge=0, lt=1, description="Muon's momentum")
    matrix_beta2: float = Field(0.95, ge=0, lt=1, description="decay of NorMuon's mean squares; 0 is plain Muon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices")
    state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what moments of matrices are kept in; bfloat16 halves their memory"
    )


class MachineConfig(Section):
    """What may differ between machines without changing the recipe. `silicon profile` measures these."""

    device: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="where to train")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="precision of the matmuls")
    micro_batch: int | None = Field(None, ge=1, description="sequences in memory at once; accumulation does the rest")
    micro_tokens: int = Field(4096, ge=1, description="tokens at once, at most, where nothing says micro_batch")
    checkpointing: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")
    chunked_loss: bool = Field(False, description="never hold all logits at once: less memory, about the same time")
    compile: bool = Field(False, description="torch.compile the blocks (experimental)")
    threads: int = Field(0, ge=0, description="CPU threads; 0 takes the physical cores")
    on_battery: Literal["continue", "pause"] = Field(
        "continue", description="without mains power: continue, or pause (save and wait; no train.time is used up)"
    )
    fused: bool = Field(True, description="AdamW as one kernel; off only where that kernel is broken")


class SampleConfig(Section):
    """How text is drawn from a model."""

    max_tokens: int = Field(300, ge=1, description="most tokens to make")
    temperature: float = Field(0.8, ge=0, le=10, description="0 always takes the likeliest token; else 0.001 or more")
    top_k: int = Field(0, ge=0, description="keep the K likeliest tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that make up this probability")
    min_p: float = Field(0.0, ge=0, lt=1, description="drop tokens under this share of the likeliest one's probability")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="above 1 makes tokens already seen less likely")
    stop: tuple[str, ...] = Field((), description="end before this text")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed gives the same text")
    num_samples: int = Field(1, ge=1, le=1000, description="how many continuations to make")

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, temperature: float) -> float:
        if 0 < temperature < COLDEST:
            raise ValueError(f"must be 0 (always the likeliest token) or at least {COLDEST}")
        return temperature


class RunConfig(Section):
    """All settings of a run, and where each came from."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    machine: MachineConfig = MachineConfig()
    sources: dict[str, str] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="after")
    def _steps_hold_whole_sequences(self) -> RunConfig:
        if self.train.tokens_per_step % self.model.context:
            tokens, context = self.train.tokens_per_step, self.model.context
            fits = " or ".join(map(str, _contexts(tokens, context)))
            raise clash(
                f"train.tokens_per_step {tokens} is not a multiple of model.context {context}",
                f"Choose model.context={fits}, or a multiple of {context} for train.tokens_per_step.",
                "train.tokens_per_step",
                "model.context",
            )
        micro = self.machine.micro_batch
        if micro and self.sequences_per_step % micro:
            raise clash(
                f"machine.micro_batch {micro} does not divide the {self.sequences_per_step} sequences of a step",
                f"Choose one of {', '.join(map(str, divisors(self.sequences_per_step)))}.",
                "machine.micro_batch",
                "train.tokens_per_step",
                "model.context",
            )
        return self

    @property
    def sequences_per_step(self) -> int:
        return self.train.tokens_per_step // self.model.context

    def unmeasured_micro_batch(self, most: int = sys.maxsize) -> int:
        """The largest micro-batch, up to `most` sequences, that holds no more than `machine.micro_tokens`."""
        room = min(most, self.machine.micro_tokens // self.model.context)
        return max((size for size in divisors(self.sequences_per_step) if size <= room), default=1)

    def replace(self, source: str, **values: Any) -> RunConfig:
        """A copy with dotted settings changed, e.g. `replace("probe", **{"machine.micro_batch": 8})`."""
        flat = flatten(self.model_dump(exclude={"sources"}, exclude_none=True), source)
        given = {name: value for name, value in values.items() if value is not None}
        return _validate(flat | given, self.sources | dict.fromkeys(given, source))

    def with_time(self, source: str, seconds: float) -> RunConfig:
        """A copy with a time budget in place of its own. It keeps every other value, also those that are defaults."""
        train = self.train.model_copy(update={name.split(".")[1]: None for name in BUDGETS} | {"time": seconds})
        others = {name: words for name, words in self.sources.items() if name not in BUDGETS}
        return self.model_copy(update={"train": train, "sources": {**others, "train.time": source}})


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings by dotted name, and the words that say where they came from ("preset tiny", "--set", "--steps")."""

    source: str
    values: Mapping[str, Any]


def divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return small + [number // candidate for candidate in reversed(small) if candidate**2 != number]


def _contexts(tokens: int, context: int) -> list[int]:
    """The nearest contexts below and above `context` that divide `tokens`, where there are any."""
    below = (size for size in range(context - 1, 1, -1) if tokens % size == 0)
    above = (size for size in range(context + 1, min(tokens, LONGEST_CONTEXT) + 1) if tokens % size == 0)
    return [size for size in (next(below, None), next(above, None)) if size]


def known_settings() -> dict[str, Any]:
    """Every setting by dotted name, with its pydantic field (type, default, description)."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items() if name != "sources"}
    return {
        f"{section}.{name}": field
        for section, model in sections.items()
        for name, field in model.model_fields.items()  # type: ignore[union-attr]
    }


def resolve(*layers: Layer) -> RunConfig:
    """Later layers win. A budget (steps, tokens, time or until) replaces any other budget of the layers below it."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        given = {name: value for name, value in layer.values.items() if value is not None}
        check_names(given, layer.source)
        _one_budget(layer.source, given, values, sources)
        values |= given
        sources |= dict.fromkeys(given, layer.source)
    return _validate(values, sources)


def check_names(names: Iterable[str], source: str) -> None:
    """SiliconError for the first name that is no setting, with the nearest that is."""
    known = known_settings()
    for name in names:
        if name not in known:
            raise SiliconError(f"unknown setting {name}", where=source, fix=_meant(name, known))


def _meant(name: str, known: Iterable[str]) -> str:
    """The setting of the most similar last part, wherever it stands: a section alone makes no likeness."""
    tails: dict[str, list[str]] = {}
    for item in known:
        tails.setdefault(item.rsplit(".", 1)[-1], []).append(item)
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)
    return (close and nearest(name, tails[close[0]], cutoff=0.0)) or "See silicon settings."


def _one_budget(source: str, given: dict[str, Any], values: dict[str, Any], sources: dict[str, str]) -> None:
    budgets = [name for name in BUDGETS if name in given]
    if len(budgets) > 1:
        raise SiliconError(f"{' and '.join(budgets)} are both given; a run has one budget", where=source)
    if budgets:
        for name in BUDGETS:
            values.pop(name, None)
            sources.pop(name, None)


def _validate(values: dict[str, Any], sources: dict[str, str]) -> RunConfig:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, key = name.split(".", 1)
        nested.setdefault(section, {})[key] = value
    try:
        return RunConfig(**nested, sources=sources)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "clash":
            names = problem["ctx"]["settings"]
            where = ", ".join(f"{name} from {sources.get(name, 'the defaults')}" for name in names)
            raise SiliconError(message, where=where, fix=problem["ctx"]["fix"]) from None
        if name in values:
            message = f"{name} = {values[name]!r}: {message[0].lower()}{message[1:]}"
        raise SiliconError(message, where=sources.get(name, ""), fix="See silicon settings.") from None


def sampling(**values: Any) -> SampleConfig:
    """Sampling settings out of the flags that were given; the rest keep their defaults."""
    try:
        return SampleConfig(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        flag = "--" + str(problem["loc"][0]).replace("_", "-")
        reason = problem["msg"].removeprefix("Value error, ")
        message = f"{flag} {values[str(problem['loc'][0])]}: {reason[0].lower()}{reason[1:]}"
        raise SiliconError(message, fix="See silicon sample --help.") from None


def flatten(tables: Mapping[str, Any], source: str) -> dict[str, Any]:
    """{"model": {"n_layer": 4}} -> {"model.n_layer": 4}, refusing what is no table of settings."""
    flat: dict[str, Any] = {}
    for section, table in tables.items():
        if section in METADATA:
            continue
        if not isinstance(table, Mapping):
            raise SiliconError(
                f"{section} stands outside a table", where=source, fix="Write it under [model], [train]..."
            )
        flat |= {f"{section}.{key}": value for key, value in table.items()}
    return flat


def parse_assignments(assignments: Iterable[str]) -> Layer:
    """`--set key=value`, the value read as TOML where it is TOML and as text where it is not."""
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise SiliconError(f"--set {text!r} has no value", fix="Write --set train.save_every=100.")
        values[name.strip()] = _toml_value(value.strip())
    return Layer("--set", values)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # ValueError also for an integer of too many digits
        return text


def profile_folders() -> list[Path]:
    """Where presets and hand-made profiles lie: in the installed package, or at the top of the source tree."""
    package = Path(__file__).parent
    folders = [package / "profiles"]
    if (package.parent / "pyproject.toml").exists():  # else the parent is site-packages, which is everybody's
        folders.append(package.parent / "profiles")
    return [folder for folder in folders if folder.is_dir()]


def profile_names(kind: str = "preset") -> list[str]:
    """What `read_profile` finds by name."""
    return sorted(_named(kind))


def _named(kind: str) -> dict[str, Path]:
    """Files by name. The package's presets have a [model] table, its profiles have none; profiles are also measured on
    this machine."""
    ours = [path for folder in reversed(profile_folders()) for path in folder.glob("*.toml")]
    ours = [path for path in ours if ("model" in read_toml(path)) == (kind == "preset")]
    measured = [] if kind == "preset" else (home() / "profiles").glob("*.toml")
    return {path.stem: path for path in [*measured, *ours]}


def read_profile(name: str, *, kind: str = "profile") -> Layer:
    """A preset or profile by name, or a TOML file by path."""
    path, named = Path(name), _named(kind)
    if path.suffix != ".toml" and "/" not in name:
        if name not in named:
            raise SiliconError(f"no {kind} named {name}", fix=_instead(name, kind), kind="missing_input")
        path = named[name]
    return Layer(f"{kind} {path.stem if path in named.values() else path}", flatten(read_toml(path), str(path)))


def _instead(name: str, kind: str) -> str:
    other = "profile" if kind == "preset" else "preset"
    if name in _named(other):
        return f"It is a {other}: type silicon train --{other} {name}."
    known = profile_names(kind)
    return nearest(name, known) or f"There are: {', '.join(known)}."


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SiliconError("no such file", where=str(path), kind="missing_input") from None
    except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, an integer of too many digits
        raise SiliconError(f"not valid TOML: {error}", where=str(path)) from None


def write_run(path: Path, config: RunConfig, about: Mapping[str, Any]) -> None:
    """run.toml: the resolved settings, where each came from, and facts about the run. Readable as a profile."""
    tables = {"about": dict(about), **config.model_dump(exclude_none=True), "sources": config.sources}
    write_file(path, tomli_w.dumps(tables))


def read_run(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The settings of a run folder with their sources, and its facts."""
    tables = read_toml(path)
    about, sources = tables.get("about"), tables.get("sources")
    if not isinstance(about, dict) or not isinstance(sources, dict):  # the first and the last table: the file is cut
        raise SiliconError("damaged: [about] or [sources] is missing", where=str(path), kind="bad_data")
    kinds = {"extended_at": float, "deadline": datetime, "tokens_per_s": float}
    if wrong := [name for name, kind in kinds.items() if name in about and not isinstance(about[name], kind)]:
        raise SiliconError(f"damaged: about.{wrong[0]} = {about[wrong[0]]!r}", where=str(path), kind="bad_data")
    config = resolve(Layer(str(path), flatten(tables, str(path))))
    return config.model_copy(update={"sources": sources}), about
