"""Curves: smoothing, scales and ticks; drawn as shapes of a page or, for the terminal, as dots in braille cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from siliconlm.cli.words import number
from siliconlm.config import duration

COLUMNS = 400  # of a page's chart: a curve has at most four points in each
BOX = 1000  # width and height of a chart's coordinates, which the page stretches
TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
DAY = 86400
STEEP = 0.05  # of a run: the first fall of the loss, which a chart may cut off
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell, from the top, left and right


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of `x` and `y`. `style` is a word that the page and the terminal know. With `words`, each point is a dot
    with its words to read there."""

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    words: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from `low` to `high`, which differ, with a tick at each of `ticks`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    words: Callable[[float], str]
    log: bool = False

    def place(self, value: float) -> float:
        """How far a value is on the way from low to high, 0 to 1 on the axis."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Chart:
    """Shapes in a box of 1000 x 1000, y downwards: paths by style, dots with words, ticks as (place, label) in
    per cent."""

    name: str
    legend: tuple[tuple[str, str], ...]
    paths: tuple[tuple[str, str], ...]
    dots: tuple[tuple[str, str, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


# --- numbers ---------------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float]) -> list[float]:
    """Means over windows that grow from nothing at the start, where a loss falls steeply, to a twentieth of all."""
    count = len(values)
    index = np.arange(count)
    half = np.minimum(count // 40, index // 3)
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(values, dtype=np.float64))))
    first, end = index - half, np.minimum(count, index + half + 1)
    return [float(value) for value in (sums[end] - sums[first]) / (end - first)]


def thin(places: Sequence[float], y: Sequence[float]) -> list[int]:
    """Which points to draw, at `places` from 0 to 1: of each column its first, lowest, highest and last.

    No peak is lost (Jugel et al. 2014, M4).
    """
    columns = np.minimum((np.asarray(places) * COLUMNS).astype(int), COLUMNS - 1)
    starts = [0, *np.flatnonzero(np.diff(columns)) + 1, len(places)]
    kept: set[int] = set()
    for first, end in pairwise(starts):
        part = np.asarray(y[first:end])
        kept |= {int(first), int(first + part.argmin()), int(first + part.argmax()), int(end) - 1}
    return sorted(kept)


# --- axes ------------------------------------------------------------------------------------------------------------


def tokens_axis(high: float, low: float = 0.0) -> Axis:
    """Up to `high` tokens; from `low` on, where that is not 0, in powers of ten."""
    if low:
        return Axis(low, max(high, 2 * low), log_ticks(low, max(high, 2 * low)), number, log=True)
    return Axis(0.0, high or 1.0, linear_ticks(0.0, high or 1.0), number)


def time_axis(high: float) -> Axis:
    steps = [*TIME_STEPS, *(DAY * count for count in (1, 2, 5, 10, 20, 50, 100))]
    step = next((step for step in steps if high / step <= 6), high)
    return Axis(0.0, high, tuple(step * count for count in range(int(high / step) + 1)), duration)


def loss_axis(lines: Sequence[Line], ceiling: float = math.inf) -> Axis:
    """All y of the lines, but for what lies above the ceiling, with some room."""
    values = [value for line in lines for value in line.y if value <= ceiling]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * (high - low) if high - low > 1e-6 else 0.5
    return Axis(low - room, high + room, linear_ticks(low - room, high + room), "{:.4g}".format)


def from_zero(values: Sequence[float], words: Callable[[float], str]) -> Axis:
    high = 1.1 * max(values, default=1.0) or 1.0
    return Axis(0.0, high, linear_ticks(0.0, high, 4), words)


def linear_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten, at most `count` intervals."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(size * unit for size in (1, 2, 5, 10) if size * unit >= 0.999 * rough)
    return tuple(step * index for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten; 1, 2 and 5 times them where there are less than three."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    whole = tuple(power for power in powers if low <= power <= high)
    return whole if len(whole) > 2 else tuple(s * p for p in powers for s in (1, 2, 5) if low <= s * p <= high)


def ceiling(lines: Iterable[Line]) -> float:
    """The highest y after the first fall: what a chart must show, where all of it would press the rest flat."""
    after = [value for line in lines for x, value in zip(line.x, line.y, strict=True) if x >= STEEP * line.x[-1]]
    return max(after, default=math.inf)


# --- on a page -------------------------------------------------------------------------------------------------------


def chart(name: str, lines: Sequence[Line], x: Axis, y: Axis) -> Chart:
    drawn = [line for line in lines if len(line.x)]
    return Chart(
        name,
        tuple((line.style, line.name) for line in drawn if line.name),
        tuple((line.style, path(line, x, y)) for line in drawn),
        tuple(dot for line in drawn if line.words for dot in marks(line, x, y)),
        tuple((100 * x.place(tick), x.words(tick)) for tick in x.ticks),
        tuple((100 * (1 - y.place(tick)), y.words(tick)) for tick in y.ticks),
    )


def path(line: Line, x: Axis, y: Axis) -> str:
    """The `d` of an SVG path."""
    places = [x.place(value) for value in line.x]
    points = (f"{BOX * places[index]:.1f} {BOX * (1 - y.place(line.y[index])):.1f}" for index in thin(places, line.y))
    return "M" + "L".join(points)


def marks(line: Line, x: Axis, y: Axis) -> list[tuple[str, str, str]]:
    """Style, `d` and words of each point that is on the chart. A line without length has round ends: a dot that no
    stretching deforms."""
    at = "M{:.1f} {:.1f}h0".format
    return [
        (line.style, at(BOX * x.place(across), BOX * (1 - y.place(value))), words)
        for across, value, words in zip(line.x, line.y, line.words, strict=True)
        if value <= y.high
    ]


# --- on a terminal ---------------------------------------------------------------------------------------------------


def drawing(curve: Line, points: Line, x: Axis, y: Axis, columns: int, rows: int) -> list[list[tuple[str, str]]]:
    """Lines of text as (style, characters): a curve in braille, 2 x 4 dots a character, points over it, and axes."""
    labels = {rows - 1 - int(y.place(tick) * (rows - 1) + 0.5): y.words(tick) for tick in y.ticks}
    margin = max(map(len, labels.values()), default=0)
    width = columns - margin - 2
    cells = braille(curve, x, y, width, rows)
    for across, value in zip(points.x, points.y, strict=True):
        row, column = round((1 - y.place(value)) * (rows - 1)), round(x.place(across) * (width - 1))
        if 0 <= row < rows:
            cells[row][column] = (points.style, "●")
    lines = [[("axis", f"{labels.get(row, ''):>{margin}} │"), *cells[row]] for row in range(rows)]
    return [*lines, [("axis", " " * margin + " └" + "─" * width)], [("axis", " " * (margin + 2) + under(x, width))]]


def braille(curve: Line, x: Axis, y: Axis, width: int, rows: int) -> list[list[tuple[str, str]]]:
    """The curve's cells: in each column of dots, those from its height to that of the column before."""
    places, heights = [x.place(value) for value in curve.x], [1 - y.place(value) for value in curve.y]
    across = np.linspace(0, 1, 2 * width)
    dots = (4 * rows - 1) * np.interp(across, places, heights, left=np.nan, right=np.nan)
    before = np.concatenate((dots[:1], dots[:-1]))
    before = np.where(np.isnan(before), dots, before)
    bits = np.zeros((rows, width), dtype=int)
    for column in np.flatnonzero(~np.isnan(dots)):
        ends = sorted((round(dots[column]), round(before[column])))
        for dot in range(max(0, ends[0]), min(4 * rows, ends[1] + 1)):
            bits[dot // 4, column // 2] |= DOTS[dot % 4][column % 2]
    return [[(curve.style, chr(0x2800 + bit)) if bit else ("", " ") for bit in row] for row in bits]


def under(x: Axis, width: int) -> str:
    """The labels of the ticks, each around its place; one that would touch another is left out."""
    text = ""
    for tick in x.ticks:
        label = x.words(tick)
        start = min(width - len(label), max(0, round(x.place(tick) * (width - 1)) - len(label) // 2))
        if not text or start > len(text):
            text = text.ljust(start) + label
    return text
