"""The loop: accumulation, evaluation that leaves no trace, divergence, averaged weights, budgets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.amp.grad_scaler import GradScaler

from siliconlm import engine
from siliconlm.config import DataConfig, Layer, RunConfig, flatten, resolve
from siliconlm.data.batches import IGNORED, Batch, Batches
from siliconlm.data.dataset import Dataset, open_dataset
from siliconlm.data.packing import Windows, validation
from siliconlm.data.prepare import prepare
from siliconlm.errors import SiliconError
from siliconlm.events import Evaluated, Event, Finished, Notice, Progress, Saved, Step
from siliconlm.hardware.device import Device
from siliconlm.hardware.watch import Reading, Watch
from siliconlm.model.weights import read_model
from siliconlm.training.checkpoint import RunFolder, create_run, read_log
from siliconlm.training.loop import accumulate, evaluate, evaluation_seconds, fit, result_of, train_step, update
from siliconlm.training.schedule import Budget, lr_scale
from siliconlm.training.state import TrainState

Config = Callable[..., RunConfig]
Stop = Callable[[TrainState], str | None]


def go_on(_: TrainState) -> None:
    return None


def windows(dataset: Dataset) -> Windows:
    """The validation split as the runs here see it."""
    found = validation(dataset, 16, DataConfig())
    assert isinstance(found, Windows)
    return found


class Run:
    """A run in this process: a folder, a state, and the events of training it."""

    def __init__(self, config: RunConfig, device: Device, dataset: Dataset, name: str = "run") -> None:
        self.dataset = dataset
        self.folder: RunFolder = create_run(name, config, {"dataset": str(dataset.path)})
        self.state = TrainState.new(config, device)
        self.budget = Budget.of(config.train)
        self.batches = Batches(dataset.train, config.model.context, config.train.seed)
        self.events: list[Event] = []

    def save(self) -> Saved:
        return self.state.save(self.folder, self.dataset.tokenizer, self.dataset.fingerprint)

    def train(self, stop: Stop = go_on, watch: Watch | None = None, kept_back: float = 0.0) -> Run:
        place = self.folder.name, str(self.folder.path)
        watch = watch or Watch("continue", Reading)

        def asked() -> str | None:
            return stop(self.state)

        data = (self.batches, self.dataset, windows(self.dataset))
        for event in fit(self.state, *data, self.budget, place, self.save, asked, watch, kept_back):
            self.events.append(event)
        return self

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.state.model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_the_split_into_micro_batches_is_only_rounding(
    config: Config, device: Device, dataset: Dataset, optimiser: str
) -> None:
    results = []
    for micro in (1, 4, 8):
        settings = config(machine__micro_batch=micro, optim__name=optimiser, optim__eps=1e-4)
        state = TrainState.new(settings, device)
        batches = Batches(dataset.train, 16, 1)
        losses = [float(train_step(state, batches.take(8 * step, 8), 0.1)[0]) for step in range(3)]
        results.append((losses, {name: weight.detach() for name, weight in state.model.named_parameters()}))
    (one, weights), *others = results
    for losses, other in others:
        assert losses == pytest.approx(one, abs=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_gradients_are_those_of_the_mean_over_all_learned_tokens(
    config: Config, device: Device, dataset: Dataset, micro: int
) -> None:
    state = TrainState.new(config(machine__micro_batch=micro), device)
    twin = TrainState.new(config(), device).model
    sequences = Batches(dataset.train, 16, 1).take(0, 8)
    targets = sequences.targets.copy()
    targets[np.random.default_rng(1).random(targets.shape) < 0.6] = IGNORED  # unequally many in each micro-batch
    loss = accumulate(state, Batch(sequences.inputs, targets))
    logits = twin(torch.from_numpy(sequences.inputs.copy())).flatten(0, 1)
    expected = F.cross_entropy(logits, torch.from_numpy(targets).flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-6)
    for (name, weight), other in zip(state.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_gradient_is_clipped_to_its_limit_and_told_as_it_was(
    config: Config, device: Device, dataset: Dataset
) -> None:
    sequences = Batches(dataset.train, 16, 1).take(0, 8)
    moved = {}
    for clip in (0.0, 0.01):
        settings = config(train__grad_clip=clip, optim__name="adamw", optim__eps=1.0, optim__weight_decay=0.0)
        state = TrainState.new(settings, device)
        before = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
        accumulate(state, sequences)
        whole = torch.cat([weight.grad.flatten() for weight in state.model.parameters()]).norm()
        state.model.zero_grad()
        _, norm = train_step(state, sequences, 1.0)
        torch.testing.assert_close(norm, whole)
        assert whole > 0.1, "there is something to clip"
        changes = [(weight.detach() - before[name]).flatten() for name, weight in state.model.named_parameters()]
        moved[clip] = float(torch.cat(changes).norm() / whole)
    # With an epsilon of 1, AdamW's first step is nearly the learning rate times the gradient.
    assert moved[0.01] == pytest.approx(moved[0.0] * 0.01 / float(whole), rel=0.2)


def test_dropout_depends_on_seed_step_and_micro_step_alone(config: Config, device: Device, dataset: Dataset) -> None:
    sequences = Batches(dataset.train, 16, 1).take(0, 8)
    state = TrainState.new(config(model__dropout=0.5), device)
    train_step(state, sequences, 1.0)  # until then the blocks give out nothing that could be dropped

    def loss(seed: int, step: int, noise: int) -> float:
        torch.manual_seed(noise)
        state.config, state.step = config(model__dropout=0.5, train__seed=seed), step
        value = float(accumulate(state, sequences))
        state.model.zero_grad()
        return value

    assert loss(1, 5, 0) == loss(1, 5, 99)
    assert len({loss(1, 5, 0), loss(1, 6, 0), loss(2, 5, 0)}) == 3


def test_micro_steps_do_not_share_their_dropout(config: Config, device: Device, dataset: Dataset) -> None:
    state = TrainState.new(config(model__dropout=0.5, machine__micro_batch=1), device)
    sequence = Batches(dataset.train, 16, 1).take(0, 1)
    once, twice = (
        float(accumulate(state, Batch(np.repeat(sequence.inputs, n, 0), np.repeat(sequence.targets, n, 0))))
        for n in (1, 2)
    )
    assert once != twice


# --- evaluation ------------------------------------------------------------------------------------------------------


def trained(config: RunConfig, device: Device, dataset: Dataset) -> TrainState:
    state, batches = TrainState.new(config, device), Batches(dataset.train, 16, 1)
    for step in range(4):
        train_step(state, batches.take(8 * step, 8), 1.0)
    return state


def by_hand(state: TrainState, dataset: Dataset) -> tuple[float, float]:
    """Nats over the whole split, one window after the other: of all tokens, and of those that are text."""
    tokens = torch.from_numpy(dataset.val.read(0, dataset.val.count))
    all_nats = text_nats = 0.0
    state.model.eval()
    for start in range(0, len(tokens) - 1, 16):
        ids, targets = tokens[start : start + 17][:-1], tokens[start : start + 17][1:]
        with torch.no_grad():
            chances = state.model(ids[None])[0].double().log_softmax(-1)
        for row, target in enumerate(targets.tolist()):
            all_nats -= chances[row, target].item()
            text_nats -= chances[row, target].item() if target not in dataset.tokenizer.special_ids else 0.0
    state.model.train()
    return all_nats, text_nats


def test_evaluation_of_the_whole_split_is_a_plain_sum(config: Config, device: Device, dataset: Dataset) -> None:
    state = trained(config(model__dropout=0.2), device, dataset)
    result = result_of(evaluate(state.model, dataset, windows(dataset), device, 7, 4))
    nats, _ = by_hand(state, dataset)
    assert result.complete and result.tokens == dataset.val.count - 1 and result.step == 4
    assert result.val_loss == pytest.approx(nats / (dataset.val.count - 1), abs=1e-6)
    assert state.model.training, "the mode is put back"


def test_bits_per_byte_are_nats_of_a_byte_tokenizer_in_other_units(
    config: Config, device: Device, dataset: Dataset
) -> None:
    result = result_of(evaluate(trained(config(), device, dataset).model, dataset, windows(dataset), device, 4, 0))
    assert result.val_bpb == pytest.approx(result.val_loss / math.log(2), rel=1e-12)


def test_bits_per_byte_leave_out_the_ends_of_documents(config: Config, device: Device, tmp_path: Path) -> None:
    """Many documents, and tokens of many bytes: bits of the text's tokens over bytes of the text."""
    (tmp_path / "many").mkdir()
    for number in range(40):
        (tmp_path / "many" / f"{number:02}.txt").write_text(f"document {number}: naïve words, words and words. " * 3)
    list(prepare([str(tmp_path / "many")], "many", "bpe", vocab_size=300))
    with open_dataset("many") as many:
        state = trained(config(), device, many)
        result = result_of(evaluate(state.model, many, windows(many), device, 4, 0))
        nats, text_nats = by_hand(state, many)
        tokens = many.val.read(0, many.val.count).tolist()
        text = many.tokenizer.decode(tokens)
        assert tokens.count(many.tokenizer.eos) > 2
        assert result.val_loss == pytest.approx(nats / (len(tokens) - 1), abs=1e-6)
        assert result.val_bpb == pytest.approx(text_nats / math.log(2) / len(text.encode()), rel=1e-6)


def test_evaluation_does_not_depend_on_the_batch(config: Config, device: Device, dataset: Dataset) -> None:
    state = trained(config(), device, dataset)
    for limit in (None, 5):
        parts = (state.model, dataset, windows(dataset), device)
        results = [result_of(evaluate(*parts, batch, 0, limit)) for batch in (1, 3, 5, 64)]
        assert len({result.tokens for result in results}) == 1
        assert [result.val_loss for result in results] == pytest.approx([results[0].val_loss] * 4, abs=1e-6)
        assert [result.val_bpb for result in results] == pytest.approx([results[0].val_bpb] * 4, abs=1e-6)


def test_a_limited_evaluation_says_so_and_is_the_same_each_time(
    config: Config, device: Device, dataset: Dataset
) -> None:
    state = trained(config(), device, dataset)
    first, second = (result_of(evaluate(state.model, dataset, windows(dataset), device, 4, 0, 5)) for _ in range(2))
    assert not first.complete and first.tokens <= 5 * 16
    assert (first.val_loss, first.tokens) == (second.val_loss, second.tokens)
    beyond = result_of(evaluate(state.model, dataset, windows(dataset), device, 4, 0, 10**6))
    assert beyond.complete


def test_evaluation_draws_no_random_numbers(config: Config, device: Device, dataset: Dataset) -> None:
    state = trained(config(model__dropout=0.3), device, dataset)
    generators = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    result_of(evaluate(state.model, dataset, windows(dataset), device, 4, 0))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state())) == generators[1:]


def test_evaluations_leave_no_trace_in_training(config: Config, device: Device, dataset: Dataset) -> None:
    with_them = Run(config(model__dropout=0.2, train__eval_every=3), device, dataset, "with").train()
    without = Run(config(model__dropout=0.2, train__eval_every=1000), device, dataset, "without").train()
    assert [event.step for event in with_them.of(Evaluated)] == [3, 6, 9, 12]
    assert [event.step for event in without.of(Evaluated)] == [12]
    assert same(with_them.weights(), without.weights())
    assert with_them.of(Step) == without.of(Step)


# --- the course of a run ---------------------------------------------------------------------------------------------


def test_events_tell_every_step_in_order(config: Config, device: Device, dataset: Dataset) -> None:
    run = Run(config(train__save_every=5, train__eval_every=4), device, dataset).train()
    steps = run.of(Step)
    assert [(step.step, step.tokens) for step in steps] == [(number, 128 * number) for number in range(1, 13)]
    scales = [lr_scale(run.state.config.train, (number + 0.5) / 12) for number in range(12)]
    assert [step.lr for step in steps] == pytest.approx(scales)
    assert [event.step for event in run.of(Saved)] == [5, 10, 12]
    assert {5, 10, 12} <= {event.step for event in run.of(Evaluated)}, "what is saved was evaluated"
    assert [run.folder.at_step(step).manifest["val_loss"] for step in (5, 10, 12)] == [
        event.val_loss for event in run.of(Evaluated) if event.step in (5, 10, 12)
    ]
    last = run.events[-1]
    assert isinstance(last, Finished) and (last.step, last.tokens, last.reason) == (12, 1536, "done")
    assert last.val_loss == run.of(Evaluated)[-1].val_loss and run.of(Evaluated)[-1].complete
    assert all(event.memory > 0 and event.tokens_per_s > 0 for event in run.of(Progress))


def test_the_model_learns(config: Config, device: Device, dataset: Dataset) -> None:
    steps = Run(config(train__steps=60), device, dataset).train().of(Step)
    assert steps[0].loss == pytest.approx(math.log(320), rel=0.05)
    assert steps[-1].loss < 0.7 * steps[0].loss


def test_a_stop_ends_after_the_step_and_saves_without_evaluating(
    config: Config, device: Device, dataset: Dataset
) -> None:
    settings = config(train__eval_every=1000)
    run = Run(settings, device, dataset).train(lambda state: "SIGINT" if state.step == 5 else None)
    assert [step.step for step in run.of(Step)] == [1, 2, 3, 4, 5]
    assert [event.step for event in run.of(Saved)] == [5]
    assert run.folder.at_step(5).manifest["val_loss"] is None
    assert run.events[-1].reason == "SIGINT" and run.events[-1].val_loss is None


def test_what_is_due_at_a_step_is_done_before_a_stop(config: Config, device: Device, dataset: Dataset) -> None:
    settings = config(train__eval_every=5)
    run = Run(settings, device, dataset).train(lambda state: "SIGINT" if state.step == 5 else None)
    assert [event.step for event in run.of(Evaluated)] == [5]
    assert run.folder.at_step(5).manifest["val_loss"] == run.of(Evaluated)[0].val_loss


def test_a_token_budget_is_rounded_up_to_whole_steps(config: Config, device: Device, dataset: Dataset) -> None:
    assert len(Run(config(train__tokens=129), device, dataset).train().of(Step)) == 2


def test_seconds_kept_back_are_not_trained_in(config: Config, device: Device, dataset: Dataset) -> None:
    run = Run(config(train__time="1000s"), device, dataset).train(kept_back=999.9)
    [end] = run.of(Finished)
    assert end.reason == "done" and end.seconds < 1000


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_time_budget_trains_decays_evaluates_and_ends(
    config: Config, device: Device, dataset: Dataset, save_every: int
) -> None:
    settings = config(train__time="3s", train__save_every=50 * save_every)
    run = Run(settings, device, dataset).train()
    rates = [step.lr for step in run.of(Step)]
    assert len(rates) > 5 and max(rates) == 1 and rates[-1] < 0.2
    assert isinstance(run.events[-1], Finished) and run.events[-1].reason == "done"
    final = run.of(Evaluated)[-1]
    assert final.complete and final.step == run.of(Saved)[-1].step == run.state.step
    assert run.folder.newest()[0].step == run.state.step

    run.state = TrainState.new(settings, device)
    run.state.restore(run.folder.newest()[0], dataset.fingerprint)
    run.state.seconds, run.events = 3.0, []  # where saving was quicker than thought, a little time is left
    run.train()
    assert run.of(Step) == run.of(Saved) == []
    assert run.of(Evaluated)[-1].complete, "a finished run that is resumed is not judged by a part"


# --- battery and sleep -----------------------------------------------------------------------------------------------


@dataclass
class Laptop:
    """Its power sources, one a look, and a clock that moves on by a minute each time that a stop is asked for."""

    sources: list[Literal["AC", "battery"]]
    stop_after: float = math.inf
    asked: int = 0

    def read(self) -> Reading:
        return Reading(self.sources.pop(0)) if self.sources else Reading("AC")

    def now(self) -> float:
        return 60.0 * self.asked

    def stop(self, _: TrainState) -> str | None:
        self.asked += 1
        return "SIGINT" if self.asked > self.stop_after else None

    def watch(self, on_battery: Literal["continue", "pause"] = "pause") -> Watch:
        return Watch(on_battery, self.read, sleepless=self.now, awake=self.now)


@pytest.fixture
def told_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read, and the watch is asked, after each step; and a pause does not wait between looks."""
    monkeypatch.setattr("siliconlm.training.loop.FLUSH_SECONDS", -1.0)
    monkeypatch.setattr("siliconlm.hardware.watch.STOP_SECONDS", 0.0)


@pytest.mark.usefixtures("told_each_step")
def test_a_pause_on_battery_changes_nothing_but_a_save(config: Config, device: Device, dataset: Dataset) -> None:
    settings = config(model__dropout=0.2, train__eval_every=1000)
    runs = {}
    for name, sources in {"straight": [], "paused": ["AC", "AC", "battery", "battery", "battery", "AC"]}.items():
        laptop = Laptop(sources)
        runs[name] = Run(settings, device, dataset, name).train(laptop.stop, laptop.watch())
        assert laptop.asked > 12 or name == "straight", "it did wait"
    straight, paused = runs["straight"], runs["paused"]
    assert same(straight.weights(), paused.weights()) and straight.of(Step) == paused.of(Step)
    assert [event.step for event in straight.of(Saved)] == [12]
    assert [event.step for event in paused.of(Saved)] == [3, 12]
    assert paused.folder.at_step(3).manifest["val_loss"] == paused.of(Evaluated)[0].val_loss
    first, second = (notice for notice in paused.of(Notice) if not notice.message.startswith("slow"))
    assert "paused at step 3" in first.message and "going on" in second.message
    assert paused.events.index(paused.of(Saved)[0]) < paused.events.index(first)
    assert straight.events[-1].seconds == paused.events[-1].seconds == 60 * 12, "waiting is not time used"


@pytest.mark.usefixtures("told_each_step")
def test_a_stop_during_a_pause_ends_the_run_without_further_work(
    config: Config, device: Device, dataset: Dataset
) -> None:
    laptop = Laptop(["AC", *["battery"] * 100], stop_after=9)
    run = Run(config(train__eval_every=1000), device, dataset).train(laptop.stop, laptop.watch())
    assert laptop.asked <= 11 and laptop.sources, "it was still on battery"
    *_, saved, notice, last = run.events
    assert isinstance(saved, Saved) and isinstance(notice, Notice) and "paused" in notice.message
    assert (last.step, last.reason, last.val_loss) == (2, "SIGINT", None)
    assert len(run.of(Evaluated)) == 1 and run.folder.newest()[0].step == 2


@pytest.mark.usefixtures("told_each_step")
def test_a_pause_ends_with_the_time_until_a_deadline(
    config: Config, device: Device, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline waits for no mains power: the run is concluded with what there is, and is used up."""
    laptop = Laptop(["AC", *["battery"] * 1000])
    now = 1.7e9
    monkeypatch.setattr("siliconlm.training.loop.time.time", lambda: now + laptop.now())
    run = Run(config(train__time="20m", train__eval_every=1000), device, dataset)
    run.budget = replace(run.budget, deadline=datetime.fromtimestamp(now + 1200, UTC))
    run.train(laptop.stop, laptop.watch())
    assert (run.events[-1].reason, run.state.step) == ("done", 2)
    assert laptop.sources, "still on battery"
    assert "time is over" in run.of(Notice)[-1].message
    assert run.folder.newest()[0].state()["seconds"] >= 1200


def test_a_pause_lets_the_computer_sleep() -> None:
    told: list[str] = []

    @contextmanager
    def asleep() -> Iterator[None]:
        told.append("may sleep")
        yield
        told.append("held again")

    laptop = Laptop([], stop_after=3)
    watch = replace(laptop.watch(), asleep=asleep, state=Reading("battery"), read=lambda: Reading("battery"))
    assert watch.wait(lambda: told.append("asked") or laptop.stop(None)) == "SIGINT"  # type: ignore[func-returns-value, arg-type]
    assert told == ["may sleep", *["asked"] * 4, "held again"]


def test_a_save_that_takes_the_last_of_the_time_leaves_a_finished_run(
    config: Config, device: Device, dataset: Dataset
) -> None:
    """The checkpoint that is left says that the budget is used up, or else a resume would go on training."""
    laptop = Laptop([])
    run = Run(config(train__time="10m", train__save_every=4, train__eval_every=1000), device, dataset)
    work = run.save

    def slow() -> Saved:
        laptop.asked += 10
        return work()

    run.save = slow  # type: ignore[method-assign]
    run.train(laptop.stop, laptop.watch("continue"))
    assert (run.events[-1].reason, run.state.step) == ("done", 4)
    left = run.folder.newest()[0].state()
    assert left["step"] == 4 and run.budget.done(4, left["seconds"]) == 1


@pytest.mark.usefixtures("told_each_step")
def test_without_a_wish_to_pause_the_battery_is_told_once(config: Config, device: Device, dataset: Dataset) -> None:
    laptop = Laptop(["AC", *["battery"] * 5])
    run = Run(config(), device, dataset).train(laptop.stop, laptop.watch("continue"))
    assert [(event.level, event.message[:10]) for event in run.of(Notice)] == [
        ("warning", "on battery"),
        ("note", "on mains p"),
    ]
    assert [event.step for event in run.of(Saved)] == [12]


@pytest.mark.usefixtures("told_each_step")
def test_time_asleep_is_time_used_and_says_nothing_of_the_pace(
    config: Config, device: Device, dataset: Dataset
) -> None:
    """It sleeps for an hour after each step, so that 12 steps use up half a day."""
    laptop, settings = Laptop([]), config(train__time="12h", train__eval_every=1000)
    watch = Watch("continue", Reading, sleepless=lambda: 60 * laptop.now())
    run = Run(settings, device, dataset).train(laptop.stop, watch)
    assert run.state.step == 12
    assert [event.message for event in run.of(Notice)] == ["the computer slept for 1:00:00, which is time used"] * 11
    by_steps = Run(config(train__eval_every=1000), device, dataset, "steps").train(laptop.stop, watch)
    middle = by_steps.of(Progress)[6]
    assert middle.seconds >= 6 * 3600 and middle.seconds_left < 60


def test_what_is_noticed_stands_in_the_log(
    config: Config, dataset: Dataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    battery = SimpleNamespace(percent=57.4, power_plugged=False)
    monkeypatch.setattr("psutil.sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    settings = flatten(config(train__save_every=6).model_dump(exclude_none=True), "test")
    told = list(engine.train(engine.Request("verse", profile="none", flags=(Layer("test", settings),)), "noted"))
    logged = [event["message"] for event in read_log(RunFolder(home / "runs" / "noted")) if event["event"] == "notice"]
    assert any("sleep" in message for message in logged) and any("on battery, 57 %" in message for message in logged)
    assert {event.message for event in told if isinstance(event, Notice)} >= set(logged)


# --- averaged weights ------------------------------------------------------------------------------------------------


def test_the_saved_model_is_the_average_of_the_weights(config: Config, device: Device, dataset: Dataset) -> None:
    run = Run(config(train__ema=0.8), device, dataset)
    average = {name: weight.double() for name, weight in run.weights().items()}

    def watch(state: TrainState) -> None:
        for name, weight in state.model.named_parameters():
            average[name] = 0.8 * average[name] + 0.2 * weight.detach().double()

    run.train(watch)
    checkpoint = run.folder.at_step(12)
    saved, raw = checkpoint.tensors("model.safetensors"), checkpoint.tensors("train.safetensors")
    assert same(raw, run.weights())
    for name, expected in average.items():
        torch.testing.assert_close(saved[name].double(), expected, atol=1e-6, rtol=0)
    assert not same(saved, raw)


def test_the_average_is_what_is_evaluated(config: Config, device: Device, dataset: Dataset) -> None:
    run = Run(config(train__ema=0.9), device, dataset).train()
    model, _ = read_model(run.folder.at_step(12).path)
    again = result_of(evaluate(model, dataset, windows(dataset), device, 4, 12))
    assert run.of(Evaluated)[-1].val_loss == pytest.approx(again.val_loss, abs=1e-9)
    raw = result_of(evaluate(run.state.model, dataset, windows(dataset), device, 4, 12))
    assert abs(raw.val_loss - again.val_loss) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"train__ema": 0.7}, {"optim__name": "adamw", "model__tied": False}], ids=str)
def test_a_state_comes_back_exactly(config: Config, device: Device, dataset: Dataset, changes: dict[str, Any]) -> None:
    settings = config(model__dropout=0.2, **changes)
    straight = Run(settings, device, dataset, "straight").train()
    cut = Run(settings, device, dataset, "cut").train(lambda state: "SIGTERM" if state.step == 5 else None)
    again = TrainState.new(settings, device)
    again.restore(cut.folder.newest()[0], dataset.fingerprint)
    assert (again.step, again.tokens, again.val_loss) == (5, 640, None)
    cut.state = again
    cut.train()
    assert straight.of(Step) == cut.of(Step)
    ours, theirs = straight.folder.at_step(12), cut.folder.at_step(12)
    for name in ours.manifest["files"].keys() - {"state.json"}:
        assert ours.sha256(name) == theirs.sha256(name), name
    assert ours.manifest["val_loss"] == theirs.manifest["val_loss"]


def test_a_state_is_refused_with_other_data(config: Config, device: Device, dataset: Dataset) -> None:
    run = Run(config(), device, dataset).train(lambda state: "SIGINT")
    with pytest.raises(SiliconError, match="not the one") as error:
        TrainState.new(config(), device).restore(run.folder.newest()[0], "another")
    assert error.value.kind == "bad_data"


# --- divergence ------------------------------------------------------------------------------------------------------


def assert_only_finite_checkpoints(folder: RunFolder) -> None:
    for path in folder.checkpoints():
        assert math.isfinite(folder.at_step(int(path.name[5:])).manifest["val_loss"] or 0)
        read_model(path)


@pytest.mark.parametrize("rate", [1e6, 1e20, 1e38])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("save_every", [1, 1000])
def test_an_absurd_learning_rate_ends_the_run_and_leaves_no_checkpoint_of_it(
    config: Config, device: Device, dataset: Dataset, rate: float, optimiser: str, save_every: int
) -> None:
    settings = config(
        optim__lr=rate, optim__matrix_lr=rate, optim__name=optimiser, train__save_every=save_every, train__steps=200
    )
    run = Run(settings, device, dataset)
    with pytest.raises(SiliconError, match="not finite") as error:
        run.train()
    assert error.value.kind == "training_failed" and "learning rate" in error.value.fix
    assert all(math.isfinite(event.loss) for event in run.of(Step))
    assert_only_finite_checkpoints(run.folder)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("stopping", [False, True])
def test_a_broken_weight_is_never_saved(
    config: Config, device: Device, dataset: Dataset, value: float, stopping: bool
) -> None:
    """Also when the signal to stop comes right after the step that broke it, and nothing has been evaluated."""

    def spoil(state: TrainState) -> str | None:
        if state.step == 6:
            with torch.no_grad():
                state.model.model.norm.weight[3] = value
        return "SIGINT" if stopping and state.step == 6 else None

    run = Run(config(train__save_every=4, train__eval_every=1000), device, dataset)
    with pytest.raises(SiliconError, match="not finite") as error:
        run.train(spoil)
    assert error.value.kind == "training_failed"
    assert [event.step for event in run.of(Saved)] == [4]
    assert run.folder.newest()[0].step == 4
    assert_only_finite_checkpoints(run.folder)


@pytest.mark.parametrize("value", [math.nan, 3e38], ids=["no number", "a number beyond all sums"])
def test_a_weight_broken_by_the_last_step_is_never_saved(
    config: Config, device: Device, dataset: Dataset, value: float
) -> None:
    """No later training loss tells of it; weights may even be finite and every logit is not."""

    def spoil(state: TrainState) -> None:
        if state.step == 12:
            with torch.no_grad():
                state.model.model.norm.weight.fill_(value)
                state.model.model.embed_tokens.weight.mul_(100)

    run = Run(config(train__save_every=4), device, dataset)
    with pytest.raises(SiliconError, match="not finite") as error:
        run.train(spoil)
    assert error.value.kind == "training_failed"
    assert [event.step for event in run.of(Saved)] == [4, 8]
    assert_only_finite_checkpoints(run.folder)


def test_an_overflow_of_float16_steps_no_optimiser(config: Config, device: Device, dataset: Dataset) -> None:
    """A norm that is not finite spreads to all gradients when they are clipped, to Muon's too."""
    state = TrainState.new(config(), device)
    state.scaler = GradScaler(device.kind)
    batch = Batches(dataset.train, state.config.model.context, 1).take(0, 4)
    before = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
    accumulate(state, batch)
    state.model.model.embed_tokens.weight.grad[0, 0] = torch.inf
    update(state, 1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in state.model.named_parameters())
    accumulate(state, batch)
    update(state, 1.0)
    assert not torch.equal(state.model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert all(bool(torch.isfinite(weight).all()) for weight in state.model.parameters())


def test_evaluations_every_so_many_steps_are_foreseen_within_a_time() -> None:
    """1,000 tokens/s: 4 steps of 500 tokens take 2 s, and an evaluation of 4,000 tokens, at twice the speed, 2 s."""
    settings = {"train.tokens_per_step": 500, "model.context": 50, "train.eval_tokens": 4000, "train.eval_every": 4}
    config = resolve(Layer("test", {**settings, "train.time": 100.0}))
    taken = evaluation_seconds(config, 4000, Budget(None, 100.0), 1000.0)
    assert taken == pytest.approx(49 + 2)
