"""The charts of a run, or of several in one: which curves, and from where to where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from siliconlm.cli.plot import (
    Chart,
    Line,
    ceiling,
    chart,
    drawing,
    from_zero,
    loss_axis,
    smooth,
    time_axis,
    tokens_axis,
)
from siliconlm.cli.report import Curve, Report
from siliconlm.cli.words import number, size

COLOURS = 6  # of runs side by side; then they come again
UNIT = "nats per token"
Across = Callable[[Curve], Sequence[float]]  # what a chart's x is


def tokens(curve: Curve) -> Sequence[float]:
    return curve.tokens


def seconds(curve: Curve) -> Sequence[float]:
    return curve.seconds


def losses(reports: Sequence[Report]) -> list[tuple[str, str, Chart]]:
    """The loss over tokens, over tokens in powers of ten, and over time: a word for the page, a name, the chart."""
    if not any(report.loss.values for report in reports):
        return []
    by_tokens, by_time = lines(reports, tokens), lines(reports, seconds)
    first, last = min(value for line in by_tokens for value in line.x if value), furthest(by_tokens)
    cut = loss_axis(by_tokens, ceiling(line for line in by_tokens if line.style != "raw"))
    made = [
        ("tokens", "tokens", chart(UNIT, by_tokens, tokens_axis(last), cut)),
        ("log", "tokens, log scale", chart(UNIT, by_tokens, tokens_axis(last, first), loss_axis(by_tokens))),
    ]
    if longest := furthest(by_time):
        made.append(("time", "time", chart(UNIT, by_time, time_axis(longest), cut)))
    return made


def furthest(drawn: Iterable[Line]) -> float:
    return max(line.x[-1] for line in drawn if line.x)


def lines(reports: Sequence[Report], across: Across) -> list[Line]:
    """The curves of losses: of one run with its single steps and its floor, of several each in a colour."""
    if len(reports) > 1:
        return [line for index, report in enumerate(reports) for line in coloured(report, index % COLOURS, across)]
    [report] = reports
    raw = Line("each step", "raw", across(report.loss), report.loss.values)
    return [raw, training(report, across), validation(report, across), *floor(report, across)]


def coloured(report: Report, colour: int, across: Across) -> tuple[Line, Line]:
    return training(report, across, report.run, f"run-{colour} thin"), validation(report, across, "", f"run-{colour}")


def training(report: Report, across: Across, name: str = "training, smoothed", style: str = "train") -> Line:
    return Line(name, style, across(report.loss), smooth(report.loss.values))


def validation(report: Report, across: Across, name: str = "validation", style: str = "val") -> Line:
    points = report.evaluations
    curve = Curve([p.tokens for p in points], [p.seconds for p in points], [p.val_loss for p in points])
    words = [f"step {point.step:,}: {point.val_loss:.4f}" for point in points]
    return Line(name, style, across(curve), curve.values, words)


def floor(report: Report, across: Across) -> list[Line]:
    x = across(report.loss)
    if report.floor is None or not x:
        return []
    return [Line("entropy of the validation text", "floor", [x[0], x[-1]], [report.floor.per_token] * 2)]


def over_tokens(report: Report) -> list[Chart]:
    """The learning rate, the speed and the memory."""
    wanted: list[tuple[str, Curve, Callable[[float], str]]] = [
        ("learning rate, as a share of its peak", report.learning_rate, "{:.2g}".format),
        ("tokens per second", report.speed, number),
        ("memory", report.memory, size),
    ]
    return [small(name, curve, words) for name, curve, words in wanted if curve.values]


def small(name: str, curve: Curve, words: Callable[[float], str]) -> Chart:
    line = Line("", "train", curve.tokens, curve.values)
    return chart(name, [line], tokens_axis(curve.tokens[-1]), from_zero(curve.values, words))


def terminal_plot(report: Report, columns: int, rows: int) -> list[list[tuple[str, str]]]:
    """The loss over tokens as lines of (style, characters); none where nothing was trained yet."""
    if not report.loss.values:
        return []
    both = training(report, tokens), validation(report, tokens)
    return drawing(*both, tokens_axis(furthest(both)), loss_axis(both, ceiling(both)), columns, rows)
