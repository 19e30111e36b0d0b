"""The one training loop, its step, and evaluation. Pretraining, resuming and probing differ only in arguments."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from siliconlm.config import RunConfig, TrainConfig
from siliconlm.data.batches import IGNORED, Batch, Stream
from siliconlm.data.dataset import Dataset
from siliconlm.data.packing import Validation
from siliconlm.errors import SiliconError
from siliconlm.events import Evaluated, Event, Finished, Notice, Progress, Saved, Step, Working
from siliconlm.hardware.device import Device
from siliconlm.hardware.watch import Watch
from siliconlm.model.decoder import Decoder
from siliconlm.training import optim
from siliconlm.training.checkpoint import checkpoint_bytes
from siliconlm.training.schedule import Budget, lr_scale
from siliconlm.training.state import TrainState

FLUSH_SECONDS = 0.5  # how often the device is waited for and the losses are read
EVALUATIONS = 20  # in a run, unless train.eval_every says otherwise
EVALUATION_TOKENS = 2048  # at once, at least
EVALUATION_SHARE = 0.03  # of a budget, spent on evaluations before the last one
SAVE_SECONDS = 300.0
SAVE_SPEED = 300e6  # bytes per second, guessed until a save is measured
EVALUATION_SPEED = 2.0  # guessed ratio of evaluation to training speed, until it is measured
DEADLINE_SPARE = 1.0  # seconds: a deadline, unlike a length of time, is not to be passed
FINAL_EVALUATION_SHARE = 0.1  # of a time budget, at most
OVER = "deadline"  # ends a pause, not the run


def train_step(state: TrainState, batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
    """One optimiser step on a batch: loss (nats per learned token, before the step) and gradient norm.

    Both stay on the device. `lr` is a share of each group's peak learning rate.
    """
    loss = accumulate(state, batch)
    norm = update(state, lr)
    state.step += 1
    state.tokens += batch.inputs.size
    return loss, norm


def accumulate(state: TrainState, batch: Batch) -> Tensor:
    """Gradients of the mean loss over all learned tokens of a step, one micro-batch after the other; returns that loss.

    The sum over tokens is divided by their number in the whole step, so splitting it into other micro-batches changes
    only rounding. Dropout depends on (seed, step, micro-step) alone.
    """
    config, device = state.config, state.device
    micro = config.machine.micro_batch or len(batch)
    total = max(1, batch.learned)
    loss = torch.zeros((), device=device.torch_device)
    for index, start in enumerate(range(0, len(batch), micro)):
        device.seed(_mixed(config.train.seed, state.step, index))
        ids, targets, documents = to_device(batch.rows(start, start + micro), device)
        with device.autocast():
            part = state.model.loss(ids, targets, config.machine.chunked_loss, documents) / total
        (state.scaler.scale(part) if state.scaler else part).backward()
        loss += part.detach()
    return loss


def to_device(batch: Batch, device: Device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, targets and documents [B, T] on the device."""
    place = device.torch_device
    ids, targets = (torch.from_numpy(np.ascontiguousarray(part)).to(place) for part in (batch.inputs, batch.targets))
    return ids, targets, None if batch.documents is None else torch.from_numpy(batch.documents).to(place)


def update(state: TrainState, lr: float) -> Tensor:
    """Clip, step the optimisers at `lr` times their peak rates, clear the gradients; returns the gradient norm."""
    train, scaler = state.config.train, state.scaler
    optim.set_lr(state.optimisers, lr)
    for optimiser in state.optimisers if scaler else []:
        scaler.unscale_(optimiser)  # type: ignore[union-attr, arg-type]  # it reads `param_groups` alone
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), train.grad_clip or math.inf)
    # float16 overflows now and then. Clipping spreads that to every gradient, so no optimiser may step.
    if scaler is None or bool(torch.isfinite(norm)):
        for optimiser in state.optimisers:
            optimiser.step()
        if state.ema:
            state.average()
    if scaler:
        scaler.update()
    state.model.zero_grad(set_to_none=True)
    return norm


def _mixed(*numbers: int) -> int:
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def evaluate(
    model: Decoder,
    dataset: Dataset,
    windows: Validation,
    device: Device,
    batch: int,
    step: int,
    limit: int | None = None,
) -> Generator[Event, None, Evaluated]:
    """The loss on a dataset's validation split, each learned token scored once.

    `val_loss` is nats per token; `val_bpb` bits per byte of text, end-of-text tokens left out. With a `limit` only
    that many windows are used, spread evenly. Draws no random numbers.
    """
    start = time.perf_counter()
    context = model.config.context
    wanted = min(limit or windows.windows, windows.windows)
    specials = np.array(sorted(dataset.tokenizer.special_ids))
    nats = text_nats = 0.0
    tokens = text_tokens = done = 0
    was_training = model.training
    model.eval()
    try:
        for part in windows.evaluation(batch, wanted):
            with torch.no_grad(), device.autocast():
                losses = model.losses(*to_device(part, device))
            scored = losses.cpu().numpy().astype(np.float64)
            is_text = (part.targets != IGNORED) & ~np.isin(part.targets, specials)
            nats, tokens = nats + scored.sum(), tokens + part.learned
            text_nats, text_tokens = text_nats + scored[is_text].sum(), text_tokens + int(is_text.sum())
            done = min(wanted, done + len(part))
            yield Working("evaluate", done * context, wanted * context, "tokens")
    finally:
        model.train(was_training)
    bpb = text_nats / math.log(2) / max(1.0, dataset.val_bytes_per_token * text_tokens)
    seconds = round(time.perf_counter() - start, 6)
    return Evaluated(step, nats / max(1, tokens), bpb, tokens, wanted == windows.windows, seconds)


def evaluation_batch(context: int, micro_batch: int | None = None) -> int:
    """Sequences at once: the micro-batch, or more where it is small; without gradients they need little memory."""
    return max(micro_batch or 1, EVALUATION_TOKENS // context)


def evaluation_seconds(config: RunConfig, val_tokens: int, budget: Budget, tokens_per_s: float) -> float:
    """A forecast of what all evaluations of a run take, for a validation split and a training speed."""
    train, rate = config.train, EVALUATION_SPEED * tokens_per_s
    one, last = min(train.eval_tokens, val_tokens) / rate, val_tokens / rate
    if budget.steps is not None:
        count = budget.steps // train.eval_every if train.eval_every else evaluations(train, budget, rate)
        return count * one + last
    last = min(last, FINAL_EVALUATION_SHARE * budget.span)
    if train.eval_every:
        training = train.eval_every * train.tokens_per_step / tokens_per_s
        return (budget.span - last) * one / (one + training) + last
    return evaluations(train, budget, rate) * one + last


def evaluations(train: TrainConfig, budget: Budget, rate: float) -> int:
    """How many to make before the last one: as many as a small share of the budget pays for, but at least two.

    `rate` is validation tokens per second. A budget of steps is counted in tokens, so that the steps at which it
    evaluates are the same on every machine.
    """
    if budget.steps is not None:
        affordable = EVALUATION_SHARE * budget.steps * train.tokens_per_step * EVALUATION_SPEED
    else:
        affordable = EVALUATION_SHARE * budget.span * rate
    return min(EVALUATIONS, max(2, int(affordable / train.eval_tokens)))


@dataclass(slots=True)
class Clock:
    """Wall time used by the run, over all its sessions, and what the final evaluation and save will take.

    Time asleep is used too; time spent waiting for mains power is not.
    """

    budget: Budget
    before: float
    now: Callable[[], float]  # goes on while the computer sleeps
    started: float
    eval_rate: float = 0.0  # validation tokens per second
    save_seconds: float = 0.0
    flushed: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.perf_counter)
    tokens_flushed: int = 0
    train_seconds: float = 0.0  # of this session, without evaluations and saves
    train_tokens: int = 0

    @property
    def seconds(self) -> float:
        """Until a deadline, the clock on the wall tells, and nothing can be waited for."""
        if self.budget.seconds is not None and self.budget.deadline is not None:
            return self.budget.seconds - (self.budget.deadline.timestamp() - time.time())
        return self.before + self.now() - self.started

    @property
    def rate(self) -> float:
        """Training tokens per second of this session."""
        return self.train_tokens / self.train_seconds if self.train_seconds else 0.0


@dataclass(slots=True)
class Loop:
    """Training in progress: what `fit` needs beside the state."""

    state: TrainState
    batches: Stream
    dataset: Dataset
    validation: Validation
    save: Callable[[], Saved]
    stop: Callable[[], str | None]
    watch: Watch
    clock: Clock
    saved_step: int
    kept_back: float = 0.0
    pending: list[tuple[int, int, float, Tensor, Tensor]] = field(default_factory=list)
    step_seconds: float = 0.0

    @property
    def config(self) -> RunConfig:
        return self.state.config

    @property
    def windows(self) -> int:
        return self.validation.windows

    def evaluation_rate(self) -> float:
        """Validation tokens per second: measured, or guessed from the training speed; 0 when neither is known."""
        return self.clock.eval_rate or EVALUATION_SPEED * self.clock.rate

    def reserve(self) -> float:
        """Seconds to keep for the end of a time budget: the evaluation of the last checkpoint, its save, the final
        evaluation, unless the first has used all windows already, and what the caller keeps back."""
        if self.clock.budget.seconds is None:
            return 0.0
        windows, rate = self.subset(), self.evaluation_rate()
        if windows < self.windows:
            windows += self.final_windows() or self.windows
        evaluation = windows * self.config.model.context / rate if rate else 0.0
        spare = DEADLINE_SPARE + self.step_seconds if self.clock.budget.deadline else 0.0
        return evaluation + self.clock.save_seconds + spare + self.kept_back

    def done(self) -> float:
        """The share of the budget that is used; of a time budget, with half of the step that would come next."""
        return self.clock.budget.done(self.state.step, self.clock.seconds + self.step_seconds / 2, self.reserve())

    def step(self) -> None:
        """One optimiser step at the learning rate of its middle."""
        state, begun = self.state, time.perf_counter()
        per_step = self.config.sequences_per_step
        middle = self.clock.budget.middle(state.step, self.clock.seconds, self.step_seconds, self.reserve())
        lr = lr_scale(self.config.train, middle)
        sequences = self.batches.take(state.step * per_step, per_step)
        loss, norm = train_step(state, sequences, lr)
        state.val_loss = None
        state.seconds = self.clock.seconds
        self.pending.append((state.step, state.tokens, lr, loss, norm))
        self.step_seconds = time.perf_counter() - begun

    def flush(self) -> Iterator[Event]:
        """Wait for the device once and tell all steps since the last time. A non-finite loss ends the run here,
        before anything of it can be saved."""
        if not self.pending:
            return
        values = torch.stack([torch.stack((loss, norm)) for *_, loss, norm in self.pending]).float().cpu().tolist()
        for (step, tokens, lr, _, _), (loss, norm) in zip(self.pending, values, strict=True):
            if not (math.isfinite(loss) and (math.isfinite(norm) or self.state.scaler)):
                raise _diverged(f"the loss is not finite at step {step} (loss {loss}, gradient norm {norm})")
            yield Step(step, tokens, loss, norm, lr)
        self.pending.clear()
        clock, now = self.clock, time.perf_counter()
        tokens, seconds = self.state.tokens - clock.tokens_flushed, now - clock.flushed
        clock.train_tokens += tokens
        clock.train_seconds += seconds
        clock.flushed, clock.tokens_flushed = now, self.state.tokens
        done, used = self.done(), clock.seconds
        # The pace of steps is that of this session: neither an old one nor a night asleep tells how the rest goes.
        left = clock.budget.seconds_left(done, used if clock.budget.seconds else self.state.tokens / clock.rate)
        memory = self.state.device.peak_memory()
        yield Progress(self.state.step, self.state.tokens, values[-1][0], tokens / seconds, memory, done, used, left)
        yield from self.watch.look(tokens / seconds)

    def compare(self) -> Generator[Event, None, Evaluated]:
        """Evaluate on the windows that all evaluations of a run share: what its checkpoints are compared by."""
        yield from self.flush()
        result = result_of(self._evaluation(self.subset()))
        self.state.val_loss = self._checked(result).val_loss
        yield result
        return result

    def conclude(self) -> Generator[Event, None, Evaluated | None]:
        """The last evaluation, on as many windows as the budget allows; None where a stop was asked for meanwhile."""
        work = self._evaluation(self.final_windows())
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                return self._checked(end.value)
            if self.stop():
                work.close()
                return None
            yield event

    def _evaluation(self, limit: int | None) -> Generator[Event, None, Evaluated]:
        batch = evaluation_batch(self.config.model.context, self.config.machine.micro_batch)
        with self.state.averaged():
            state = self.state
            work = evaluate(state.model, self.dataset, self.validation, state.device, batch, state.step, limit)
            result = yield from work
        self.clock.eval_rate = result.tokens / result.seconds
        self.clock.flushed = time.perf_counter()
        return result

    def _checked(self, result: Evaluated) -> Evaluated:
        if not math.isfinite(result.val_loss):
            raise _diverged(f"the validation loss is not finite after step {self.state.step}")
        return result

    def checkpoint(self, last: bool = False) -> Iterator[Event]:
        """Save. The last one uses up a time budget, of which the end may have left a moment."""
        yield from self.flush()
        if not self.state.is_finite():
            raise _diverged(f"the weights are not finite after step {self.state.step}")
        self.state.seconds = max(self.clock.seconds, (self.clock.budget.seconds or 0.0) if last else 0.0)
        saved = self.save()
        self.clock.save_seconds = saved.seconds
        self.clock.saved = self.clock.flushed = time.perf_counter()
        self.saved_step = self.state.step
        yield saved

    def checkpoint_evaluated(self) -> Iterator[Event]:
        """Save, with a validation loss to compare the checkpoint by."""
        if self.state.val_loss is None:
            yield from self.compare()
        yield from self.checkpoint()

    def pause(self) -> Generator[Event, None, str | None]:
        """Save, then wait for mains power or a reason to stop, which is returned."""
        if self.saved_step != self.state.step:
            yield from self.checkpoint_evaluated()
        begun = self.clock.now()
        yield Notice(f"on battery: paused at step {self.state.step:,}, which is saved, until mains power is back")
        stopped = self.watch.wait(lambda: self.stop() or (OVER if self.passed_deadline() else None))
        self.clock.started += self.clock.now() - begun
        self.clock.saved = self.clock.flushed = time.perf_counter()
        if stopped == OVER:
            yield Notice("the time is over, and there is still no mains power", "warning")
            return None
        if not stopped:
            yield Notice("on mains power again: going on")
        return stopped

    def passed_deadline(self) -> bool:
        """Whether there is a deadline, which waits for nothing, and no time for a step before it."""
        return self.clock.budget.deadline is not None and self.done() >= 1

    def subset(self) -> int:
        """Windows of an evaluation during training: the same ones each time."""
        return max(1, self.config.train.eval_tokens // self.config.model.context)

    def final_windows(self) -> int | None:
        """All windows; fewer only where a time budget would burst. A run that is only opened again has no speed."""
        if self.clock.budget.seconds is None or not self.evaluation_rate():
            return None
        affordable = FINAL_EVALUATION_SHARE * self.clock.budget.span * self.evaluation_rate()
        windows = int(affordable // self.config.model.context)
        return None if windows >= self.windows else max(1, windows)

    def evaluation_due(self, before: float, after: float) -> bool:
        every = self.config.train.eval_every
        if every:
            return self.state.step % every == 0
        count = evaluations(self.config.train, self.clock.budget, self.evaluation_rate())
        return int(after * count) > int(before * count)

    def save_due(self) -> bool:
        every = self.config.train.save_every
        if every:
            return self.state.step % every == 0
        return time.perf_counter() - self.clock.saved > SAVE_SECONDS


def _diverged(what: str) -> SiliconError:
    fix = "Lower the learning rate (--set optim.lr=... --set optim.matrix_lr=...); checkpoints are whole."
    return SiliconError(what, fix=fix, kind="training_failed")


def result_of(work: Generator[Event, None, Evaluated]) -> Evaluated:
    """Run an evaluation to its end, without its progress records."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def fit(
    state: TrainState,
    batches: Stream,
    dataset: Dataset,
    validation: Validation,
    budget: Budget,
    run: tuple[str, str],
    save: Callable[[], Saved],
    stop: Callable[[], str | None],
    watch: Watch,
    kept_back: float = 0.0,
    begin: bool = False,
) -> Iterator[Event]:
    """Train until `budget` is used or `stop()` gives the name of a reason; asked after each step.

    Yields a Step for every optimiser step, Progress about twice a second, Evaluated and Saved when due, and ends with
    Finished. `run` is the name and folder for that last record. What is due at a step is done before a stop, so that
    a run cut in two evaluates and saves where a straight one does. The last checkpoint is committed before the last
    evaluation, which may take long. What `watch` notices is told as Notices; where it says so, the run waits, saved,
    for mains power. Of a time budget, `kept_back` seconds are left to the caller at the end. `begin`: evaluate and
    save before the first step, for a run that goes on from another's weights.
    """
    clock = Clock(budget, state.seconds, watch.sleepless, watch.sleepless(), tokens_flushed=state.tokens)
    clock.save_seconds = checkpoint_bytes(state.config) / SAVE_SPEED
    loop = Loop(state, batches, dataset, validation, save, stop, watch, clock, state.step, kept_back)
    stopped: str | None = None
    result: Evaluated | None = None
    if begin:
        yield from loop.checkpoint_evaluated()
    while not stopped and (before := loop.done()) < 1:
        loop.step()
        after = loop.done()
        if time.perf_counter() - clock.flushed > FLUSH_SECONDS:
            yield from loop.flush()
        if after < 1 and loop.evaluation_due(before, after):
            yield from loop.compare()
        if after < 1 and loop.save_due():
            yield from loop.checkpoint_evaluated()
        stopped = stop()
        if after < 1 and watch.pauses and not stopped:
            stopped = yield from loop.pause()
    yield from loop.flush()
    # A save may have taken the last of a time budget: then what it saved does not yet say that the budget is used up.
    if loop.saved_step != state.step or not (stopped or budget.done(state.step, state.seconds) >= 1):
        if not stopped:
            result = yield from loop.compare()
        yield from loop.checkpoint(last=not stopped)
    if not (stopped or (result and result.complete)):
        result = yield from loop.conclude()
        if result:
            yield result
    reason = stopped or ("done" if result else stop() or "stopped")
    yield Finished(
        *run,
        state.step,
        state.tokens,
        round(clock.seconds, 3),
        reason,
        result.val_loss if result else None,
        result.val_bpb if result else None,
        result.complete if result else False,
        round(clock.rate, 1),
    )
