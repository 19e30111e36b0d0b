"""Going on from a model: on conversations, or on other text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from siliconlm.config import Layer
from siliconlm.data.conversations import (
    BUILTIN_CHAT,
)
from siliconlm.data.dataset import Dataset, open_dataset
from siliconlm.data.packing import Packed, training_stream
from siliconlm.engine.datasets import tuning_data
from siliconlm.engine.models import Opened, check_tokenizer, open_model
from siliconlm.engine.setup import Request, Stop, gathering, resolve_request, tune
from siliconlm.engine.training import by_the_clock, logged, run_events, tell_disk
from siliconlm.events import (
    Chosen,
    Event,
    Notice,
)
from siliconlm.files import sha256
from siliconlm.training.checkpoint import (
    check_new_run,
    create_run,
    free_run_name,
)
from siliconlm.training.schedule import Budget

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
    folder = yield from tuning_data(opened, data, template)
    with open_dataset(folder) as dataset:
        check_tokenizer(dataset, opened)
        shape = opened.model.config.model_dump() | {"dropout": 0.0}
        origin = Layer(f"base {opened.name}", {f"model.{key}": value for key, value in shape.items()} | TUNING)
        request = replace(request, data=folder, shape=_with_steps(origin, opened, dataset, request, epochs))
        base_config = resolve_request(request, dataset)
        deadline = base_config.train.until
        Budget.of(by_the_clock(base_config, deadline).train)
        dataset.verify()
        choices: list[Chosen] = []
        tuned, tokens_per_s = yield from gathering(tune(request, dataset), choices)
        config = by_the_clock(tuned, deadline)
        yield from tell_disk(config)
        stream = training_stream(dataset, config.model.context, config.data, config.train.seed)
        if isinstance(stream, Packed) and stream.cut:
            what = f"{stream.cut:,} conversations are longer than the context of {config.model.context:,} tokens"
            yield Notice(f"{what}: their ends are not learned", "warning")
        about: dict[str, Any] = {"dataset": str(dataset.path), "data": dataset.fingerprint, "preset": opened.name}
        about |= {"from": opened.name, "from_path": str(opened.path), "from_sha256": sha256(opened.weights)}
        about |= {"stage": "chat" if dataset.is_chat else "text"}
        about |= {"deadline": deadline} if deadline else {}
        about |= {"tokens_per_s": tokens_per_s} if tokens_per_s else {}
        run = create_run(name or free_run_name(f"{opened.name}-{dataset.name}"), config, about)
        with run.lock():
            yield from logged(run, run_events(run, config, dataset, stop, choices=choices, base=opened.model))


def _with_steps(origin: Layer, opened: Opened, dataset: Dataset, request: Request, epochs: float | None) -> Layer:
    """The layer of a base with steps for so many passes over the data in it."""
    config = resolve_request(replace(request, shape=Layer(origin.source, {**origin.values, "train.steps": 1})), dataset)
    rows = training_stream(dataset, config.model.context, config.data, config.train.seed).windows
    steps = max(1, math.ceil((epochs or EPOCHS) * rows / config.sequences_per_step))
    return Layer(origin.source, {**origin.values, "train.steps": steps})
