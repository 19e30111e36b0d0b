"""The learning rate as a shape, and the three kinds of budget."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siliconlm.config import TrainConfig
from siliconlm.errors import SiliconError
from siliconlm.training.schedule import Budget, lr_scale

shares = st.floats(0, 1)
recipes = st.builds(
    TrainConfig,
    schedule=st.sampled_from(["wsd", "cosine", "constant"]),
    warmup=st.floats(0, 0.99),
    decay=shares,
    final_lr=shares,
)


@given(recipes, shares)
def test_the_rate_is_a_share_of_its_peak(train: TrainConfig, done: float) -> None:
    assert 0 <= lr_scale(train, done) <= 1


@given(recipes, shares, shares)
def test_it_rises_to_the_end_of_the_warmup_and_never_again(train: TrainConfig, one: float, two: float) -> None:
    early, late = sorted((one, two))
    if late < train.warmup:
        assert lr_scale(train, early) <= lr_scale(train, late)
    if early >= train.warmup:
        assert lr_scale(train, early) >= lr_scale(train, late)


@given(recipes.filter(lambda train: train.schedule == "cosine" or (train.schedule == "wsd" and train.decay > 0)))
def test_it_ends_at_the_final_rate(train: TrainConfig) -> None:
    assert lr_scale(train, 1.0) == pytest.approx(train.final_lr, abs=1e-9)


@given(recipes)
def test_it_starts_at_nothing_where_there_is_a_warmup(train: TrainConfig) -> None:
    if train.warmup > 1e-300:
        assert lr_scale(train, 0.0) == 0
        assert lr_scale(train, train.warmup / 2) == pytest.approx(0.5)


def test_wsd_by_hand() -> None:
    train = TrainConfig(schedule="wsd", warmup=0.1, decay=0.4, final_lr=0.2)
    points = {0.0: 0, 0.05: 0.5, 0.1: 1, 0.3: 1, 0.6: 1, 0.7: 0.8, 0.8: 0.6, 0.9: 0.4, 1.0: 0.2}
    assert [lr_scale(train, done) for done in points] == pytest.approx(list(points.values()))


def test_cosine_by_hand() -> None:
    train = TrainConfig(schedule="cosine", warmup=0.2, final_lr=0.1)
    for done in (0.2, 0.4, 0.6, 0.8, 1.0):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2
        assert lr_scale(train, done) == pytest.approx(expected)


def test_constant_stays_at_its_peak() -> None:
    train = TrainConfig(schedule="constant", warmup=0.1, final_lr=0.0)
    assert [lr_scale(train, done) for done in (0.1, 0.5, 1.0)] == [1, 1, 1]


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_of_steps() -> None:
    budget = Budget.of(TrainConfig(steps=40))
    assert budget == Budget(40, None)
    assert [budget.done(step, 1e9) for step in (0, 10, 40, 50)] == [0, 0.25, 1, 1]
    assert "40 steps" in budget.describe()


@given(st.integers(1, 10**12), st.integers(2, 10**6))
def test_a_budget_of_tokens_is_whole_steps_that_reach_it(tokens: int, per_step: int) -> None:
    budget = Budget.of(TrainConfig(tokens=tokens, tokens_per_step=per_step))
    assert budget.steps is not None and budget.seconds is None
    assert (budget.steps - 1) * per_step < tokens <= budget.steps * per_step


def test_a_budget_of_time_keeps_its_reserve() -> None:
    budget = Budget.of(TrainConfig(time="2m"))  # type: ignore[arg-type]  # a time is written as text
    assert budget == Budget(None, 120.0)
    assert budget.done(10**9, 30.0) == 0.25
    assert budget.done(0, 54.0, reserve=12.0) == 0.5
    assert budget.done(0, 108.0, reserve=12.0) == 1 == budget.done(0, 500.0)
    assert budget.done(0, 1.0, reserve=200.0) == 1, "a reserve that eats the budget ends training"


def test_without_a_budget_there_is_no_hidden_default() -> None:
    with pytest.raises(SiliconError, match="no budget") as caught:
        Budget.of(TrainConfig())
    assert caught.value.fix == "Give --steps, --tokens, --time or --until."


@given(st.integers(1, 500))
def test_the_rate_is_read_at_the_middle_of_each_step(steps: int) -> None:
    budget = Budget.of(TrainConfig(steps=steps))
    middles = [budget.middle(step, 0.0, 0.0) for step in range(steps)]
    assert middles == pytest.approx([(step + 0.5) / steps for step in range(steps)])
    assert middles[0] > 0 and middles[-1] < 1, "so the first step moves and the last one counts"


def test_the_middle_of_a_timed_step_is_half_a_step_ahead() -> None:
    assert Budget(None, 100.0).middle(7, 40.0, 4.0) == pytest.approx(0.42)
    assert Budget(None, 100.0).middle(7, 40.0, 4.0, reserve=16.0) == pytest.approx(0.5)


def test_the_time_left() -> None:
    assert Budget(None, 100.0).seconds_left(0.3, 40.0) == 60
    assert Budget(None, 100.0).seconds_left(1.0, 140.0) == 0
    assert Budget(100, None).seconds_left(0.25, 10.0) == pytest.approx(30)
    assert Budget(100, None).seconds_left(0.0, 0.0) is None


# --- more time -------------------------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 22, 6, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


@pytest.mark.parametrize("budget", [Budget(40, None), Budget(None, 90.0), Budget(None, 90.0, 60.0)])
def test_a_used_up_budget_is_extended_by_a_schedule_of_its_own(budget: Budget) -> None:
    extended = budget.extended(40, 90.0, 200.0)
    assert extended == Budget(None, 290.0, start=90.0) and extended.span == 200
    assert [extended.done(40, seconds) for seconds in (80.0, 90.0, 140.0, 290.0, 300.0)] == [0, 0, 0.25, 1, 1]
    assert extended.done(40, 180.0, reserve=20.0) == 0.5 and extended.seconds_left(0.25, 140.0) == 150
    train = TrainConfig(warmup=0.1, decay=0.4)
    points = {90.0: 0, 100.0: 0.5, 110.0: 1, 210.0: 1, 250.0: 0.5, 290.0: 0}
    assert [lr_scale(train, extended.done(40, seconds)) for seconds in points] == pytest.approx([*points.values()])


def test_a_budget_with_time_left_grows() -> None:
    assert Budget(None, 90.0).extended(3, 40.0, 30.0) == Budget(None, 120.0)
    assert Budget(None, 90.0, 60.0).extended(3, 70.0, 30.0) == Budget(None, 120.0, 60.0)
    later = LATER + timedelta(seconds=30)
    assert Budget(None, 90.0, deadline=LATER).extended(3, 70.0, 30.0) == Budget(None, 120.0, deadline=later)
    with pytest.raises(SiliconError, match="only 39 of 40 steps are done") as caught:
        Budget(40, None).extended(39, 1e6, 30.0)
    assert caught.value.fix


def test_a_budget_until_a_deadline_is_what_is_left_of_the_day() -> None:
    budget = Budget(None, 7200.0, deadline=LATER)
    assert budget.resumed(600.0, NOW) == Budget(None, 4200.0, deadline=LATER)
    assert budget.resumed(600.0, LATER) == Budget(None, 7200.0), "too late: the time that was left of it"
    assert Budget(None, 90.0).resumed(10.0, NOW) == Budget(None, 90.0)


def test_budgets_in_words() -> None:
    assert Budget(4000, None).describe() == "4,000 steps"
    assert [Budget(None, time).describe() for time in (0.5, 90.0, 5400.0)] == ["0.5 s", "90 s", "1h30m"]
    assert Budget(None, 360.0, 60.0).describe() == "60 s + 5m"
    assert Budget(None, 5400.0, deadline=LATER).describe() == "1h30m until 2026-11-22 07:00"
