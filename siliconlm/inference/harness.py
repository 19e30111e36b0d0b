"""A model as lm-evaluation-harness wants it: log-likelihoods and continuations (Gao et al., EleutherAI).

lm_eval is an extra, and slow to import: nothing here is imported before it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from siliconlm.config import SampleConfig
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Measured
from siliconlm.hardware.device import Device
from siliconlm.inference.session import Session, StopText, banned_ids
from siliconlm.model.decoder import Decoder

AT_ONCE = 8192  # tokens scored together
LONGEST_ANSWER = 256  # tokens, where a task does not say


def measure(
    model: Decoder, tokenizer: Tokenizer, device: Device, tasks: Sequence[str], step: int, limit: int | None = None
) -> Iterator[Measured]:
    """Every metric of the named tasks (or of YAML files that define one), on at most `limit` questions each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns of forks otherwise
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        fix = "Type pip install 'siliconlm[eval]'."
        raise SiliconError("--tasks needs lm-evaluation-harness", fix=fix, kind="bad_environment") from None
    files = [Path(word).expanduser() for word in tasks if word.endswith((".yaml", ".yml"))]
    if missing := [path for path in files if not path.is_file()]:
        raise SiliconError("no such file", where=str(missing[0]), fix="Check the path.", kind="missing_input")
    manager = TaskManager(include_path=[str(path.parent.resolve()) for path in files] or None)
    names = [_task_of(Path(word)) if word.endswith((".yaml", ".yml")) else word for word in tasks]
    for name in names:
        if name not in manager.all_tasks:
            fix = nearest(name, manager.all_tasks) or "See lm-evaluation-harness for the names of tasks."
            raise SiliconError(f"no task named {name}", fix=fix, kind="missing_input")
    found = lm_eval.simple_evaluate(
        model=_harness(model, tokenizer, device),
        tasks=names,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    for name, metrics in found["results"].items():
        count = found["n-samples"].get(name, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield Measured(step, name, metric, float(value), int(count))


def _task_of(path: Path) -> str:
    """The name that a YAML file gives its task."""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "task":
            return value.strip().strip("\"'")
    raise SiliconError("it names no task", where=str(path), fix="Write task: my_task in it.", kind="bad_data")


def _harness(model: Decoder, tokenizer: Tokenizer, device: Device) -> Any:
    from lm_eval.api.model import LM

    class Harness(LM):  # type: ignore[misc]
        """The three questions that tasks ask of a model."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [_pair(tokenizer, *request.args) for request in requests]
            return scores(model, device, pairs)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [_rolling(model, tokenizer, device, request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_until(model, tokenizer, device, *request.args) for request in requests]

    return Harness()


def _pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of a context and its continuation, and where the latter begins. White space at the seam belongs to
    the continuation, whose tokens begin with it."""
    body = context.rstrip()
    before = tokenizer.encode(body) if body else [tokenizer.eos]
    return before + tokenizer.encode(context[len(body) :] + continuation), len(before)


def scores(model: Decoder, device: Device, pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """For each (ids, start) the sum of log p of ids[start:] in nats, and whether each was the likeliest.

    Of what is longer than the context the beginning is cut off.
    """
    context = model.config.context
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda number: len(pairs[number][0]))
    while order:
        length = min(context, len(pairs[order[-1]][0]) - 1)
        chosen, order = order[-max(1, AT_ONCE // max(1, length)) :], order[: -max(1, AT_ONCE // max(1, length))]
        inputs = np.zeros((len(chosen), length), dtype=np.int64)
        for row, number in enumerate(chosen):
            ids = pairs[number][0][:-1][-length:]
            inputs[row, : len(ids)] = ids
        with torch.inference_mode(), device.autocast():
            log_p = torch.log_softmax(model(torch.from_numpy(inputs).to(device.torch_device)).float(), -1).cpu()
        for row, number in enumerate(chosen):
            found[number] = _score(log_p[row], *pairs[number], length)
    return found


def _score(log_p_TV: torch.Tensor, ids: list[int], start: int, length: int) -> tuple[float, bool]:
    kept = ids[-(length + 1) :]
    first = max(1, start - (len(ids) - len(kept)))
    targets = torch.tensor(kept[first:])
    rows = log_p_TV[first - 1 : len(kept) - 1]
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


def _rolling(model: Decoder, tokenizer: Tokenizer, device: Device, text: str) -> float:
    """Log p of a whole text, in windows of the context: each token once, the first from the end-of-text token."""
    ids, context = [tokenizer.eos, *tokenizer.encode(text)], model.config.context
    windows = [(ids[first : first + context + 1], 1) for first in range(0, len(ids) - 1, context)]
    return sum(score for score, _ in scores(model, device, windows))


def _until(model: Decoder, tokenizer: Tokenizer, device: Device, prompt: str, settings: dict[str, Any]) -> str:
    """The likeliest continuation up to a stop text. (Tasks that want to draw at random are refused.)"""
    if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
        raise SiliconError("the task draws answers at random, which would not repeat", fix="Choose another task.")
    until = settings.get("until") or []
    hold = StopText(tuple([until] if isinstance(until, str) else until))
    most = int(settings.get("max_gen_toks", LONGEST_ANSWER))
    ids = (tokenizer.encode(prompt) or [tokenizer.eos])[-max(1, model.config.context - most) :]
    session, stream, banned = Session(model, device), tokenizer.stream(), banned_ids(model, tokenizer)
    text = ""
    for _ in range(SampleConfig(max_tokens=most).max_tokens):
        token = int(session.feed([ids])[0].index_fill(0, banned, -torch.inf).argmax())
        if token == tokenizer.eos:
            break
        text += hold.push(stream.push(token))
        if hold.found:
            return text
        ids = [token]
    return text + hold.push(stream.flush()) + hold.flush()
