"""Curves as numbers, as shapes and as characters."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siliconlm.cli.plot import (
    Axis,
    Line,
    ceiling,
    chart,
    drawing,
    from_zero,
    linear_ticks,
    log_ticks,
    loss_axis,
    smooth,
    thin,
    time_axis,
    tokens_axis,
)

PERCENT = Axis(0.0, 100.0, (0.0, 50.0, 100.0), "{:.0f}".format)
FINITE = st.floats(-1e6, 1e6, allow_nan=False)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_smoothing_leaves_a_straight_line_and_the_first_values_alone() -> None:
    line = [3 - 0.001 * step for step in range(1000)]
    smoothed = smooth(line)
    assert smoothed[:3] == pytest.approx(line[:3]) and smoothed[:-30] == pytest.approx(line[:-30])
    assert smooth([]) == [] and smooth([2.0]) == [2.0]


def test_smoothing_takes_noise_away() -> None:
    noisy = [2.0 + (-1) ** step for step in range(400)]
    assert all(abs(value - 2) <= 0.12 for value in smooth(noisy)[40:])


@given(st.lists(FINITE, min_size=1, max_size=3000))
def test_thinning_keeps_ends_and_extremes_and_stays_small(values: list[float]) -> None:
    places = [index / max(1, len(values) - 1) for index in range(len(values))]
    kept = thin(places, values)
    assert kept == sorted(set(kept)) and len(kept) <= 1600
    assert kept[0] == 0 and kept[-1] == len(values) - 1
    assert max(values[index] for index in kept) == max(values) and min(values[index] for index in kept) == min(values)


# --- axes ------------------------------------------------------------------------------------------------------------


@given(FINITE, st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    high = low + span
    if high == low:
        return
    ticks = linear_ticks(low, high)
    slack = 1e-6 * (abs(low) + abs(high) + span)
    assert len(ticks) <= 6 and all(low - slack <= tick <= high + slack for tick in ticks)


def test_ticks_are_round() -> None:
    assert linear_ticks(0.9, 3.2) == (1.0, 1.5, 2.0, 2.5, 3.0)
    assert linear_ticks(0, 770_000) == (0, 200_000, 400_000, 600_000)
    assert log_ticks(2048, 3e6) == (1e4, 1e5, 1e6)
    assert log_ticks(2048, 30_000) == (5e3, 1e4, 2e4)
    assert [tokens_axis(3e6).words(tick) for tick in tokens_axis(3e6).ticks] == ["0", "1 M", "2 M", "3 M"]
    assert [time_axis(200).words(tick) for tick in time_axis(200).ticks] == ["0s", "1m", "2m", "3m"]
    assert [time_axis(9e4).words(tick) for tick in time_axis(9e4).ticks] == ["0s", "6h", "12h", "18h", "1d"]


def test_places_on_axes() -> None:
    assert [tokens_axis(1000, 10).place(value) for value in (10, 100, 1000)] == pytest.approx([0, 0.5, 1])
    assert tokens_axis(1000, 10).place(0) == 0, "before the first step there is no logarithm"
    assert [PERCENT.place(value) for value in (0, 25, 100)] == [0, 0.25, 1]


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 2.0]])
def test_an_axis_has_a_length_however_little_it_shows(values: list[float]) -> None:
    across = [float(index) for index in range(len(values))]
    for axis in (loss_axis([Line("", "", across, values)]), from_zero(values, str), tokens_axis(0), tokens_axis(5, 5)):
        assert axis.high > axis.low and all(math.isfinite(axis.place(tick)) for tick in axis.ticks)


def test_the_first_fall_may_be_cut_off_and_nothing_else() -> None:
    falling = Line("", "", range(101), [100.0, 50.0, 20.0, 10.0, 8.0, *[4 - 0.01 * step for step in range(96)]])
    assert ceiling([falling]) == 4.0 and loss_axis([falling], 4.0).high < 4.5
    assert ceiling([]) == math.inf


# --- on a page -------------------------------------------------------------------------------------------------------


def test_a_chart_has_its_curve_where_the_axes_say() -> None:
    made = chart("it", [Line("rising", "train", [0, 50, 100], [0.0, 50.0, 100.0])], PERCENT, PERCENT)
    assert made.paths == (("train", "M0.0 1000.0L500.0 500.0L1000.0 0.0"),)
    assert made.legend == (("train", "rising"),) and made.dots == ()
    assert made.x_ticks == ((0.0, "0"), (50.0, "50"), (100.0, "100"))
    assert made.y_ticks == ((100.0, "0"), (50.0, "50"), (0.0, "100"))


def test_dots_have_words_and_stay_on_the_chart() -> None:
    made = chart("it", [Line("", "val", [0, 100], [500.0, 50.0], ["far above", "here"])], PERCENT, PERCENT)
    assert made.dots == (("val", "M1000.0 500.0h0", "here"),) and made.legend == ()


def test_a_long_curve_makes_a_small_page() -> None:
    many = Line("", "train", range(100_000), [math.sin(index) for index in range(100_000)])
    [(_, path)] = chart("it", [many], tokens_axis(100_000), loss_axis([many])).paths
    assert len(path) < 30_000 and re.fullmatch(r"M[\d. ]+(L[\d. ]+)*", path)


# --- on a terminal ---------------------------------------------------------------------------------------------------


def text(lines: list[list[tuple[str, str]]]) -> list[str]:
    return ["".join(part for _, part in line) for line in lines]


def test_a_drawing_to_look_at() -> None:
    fall = Line("", "train", [0, 50, 100], [100.0, 0.0, 100.0])
    drawn = drawing(fall, Line("", "val", [50], [50.0], ["half"]), PERCENT, PERCENT, 25, 5)
    assert text(drawn) == [
        "100 │⠙⢦⡀               ⣠⠞",
        "    │  ⠙⢦⡀           ⣠⠞⠁ ",
        " 50 │    ⠙⢦⡀   ●   ⣠⠞⠁   ",
        "    │      ⠙⢦⡀   ⣠⠞⠁     ",
        "  0 │        ⠙⢦⣠⠞⠁       ",
        "    └────────────────────",
        "     0        50      100",
    ]
    assert [style for line in drawn for style, _ in line if style == "val"] == ["val"]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.integers(30, 120), st.integers(4, 30))
def test_a_drawing_never_leaves_its_frame(losses: list[float], columns: int, rows: int) -> None:
    across = [float(64 * (step + 1)) for step in range(len(losses))]
    lines = [Line("", "train", across, losses), Line("", "val", across, losses, ["x"] * len(losses))]
    drawn = text(drawing(*lines, tokens_axis(across[-1]), loss_axis(lines, 5.0), columns, rows))
    assert len(drawn) == rows + 2 and max(map(len, drawn)) <= columns
