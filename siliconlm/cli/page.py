"""Reports as pages: one HTML file that needs no other, and the same in Markdown. Templates lie in `pages`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from siliconlm import __version__
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
from siliconlm.cli.report import Curve, Report, Setting
from siliconlm.cli.words import clock, few, number, size
from siliconlm.errors import SiliconError
from siliconlm.files import write_file

TEMPLATES = Path(__file__).parent / "pages"
COLOURS = 6  # of runs side by side; then they come again
NATS = "nats per token"
COLUMNS, ROWS = 78, 16  # of the plot in Markdown


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of runs side by side; `best` are the places of the best, where that is clear."""

    name: str
    cells: list[str]
    best: frozenset[int] = frozenset()


def write_pages(reports: Sequence[Report], output: str | None) -> list[Path]:
    """Write the HTML and the Markdown page of one run, or of several side by side; returns where.

    `output` is a file (.html or .md; the other one lies beside it) or a folder. By default a run's pages go into its
    folder, a comparison into the current one.
    """
    one = len(reports) == 1
    name = "report" if one else "comparison"
    path = target(output, Path(reports[0].path) if one else Path.cwd(), name)
    facts = single(reports[0]) if one else compared(reports)
    written = [path.with_suffix(".html"), path.with_suffix(".md")]
    for place, environment in zip(written, (html_pages(), markdown_pages()), strict=True):
        write_file(place, environment.get_template(name + place.suffix).render(facts))
    return written


def target(output: str | None, default: Path, name: str) -> Path:
    """Where the pages go, without a suffix that says which."""
    path = Path(output).expanduser() if output else default
    if path.suffix in (".html", ".md") and not path.is_dir():
        return path
    if path.is_file():
        raise SiliconError(
            f"--output {output} is a file that is no page", fix="Name a folder, or a file like run.html."
        )
    return path / f"{name}.html"


# --- templates -------------------------------------------------------------------------------------------------------


def html_pages() -> Environment:
    return _environment(autoescape=True)


def markdown_pages() -> Environment:
    return _environment(finalize=plain_markdown)


def _environment(**options: Any) -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    made.filters |= {
        "clock": clock,
        "few": few,
        "number": number,
        "size": size,
        "moment": moment,
        "fenced": fenced,
        "code": code,
    }
    made.globals["version"] = __version__
    return made


def plain_markdown(value: object) -> object:
    """Text that Markdown, and the HTML it allows, shows as it is, on one line."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(str(value).split()))


def fenced(text: str) -> Markup:
    """A block of code around a text, with a fence longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}text\n{text}\n{fence}")


def code(name: str) -> Markup:
    """The name of a setting."""
    return Markup(f"`{name}`")


def moment(seconds: float) -> str:
    """The time of day, here."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


# --- one run ---------------------------------------------------------------------------------------------------------


def single(report: Report) -> dict[str, Any]:
    """What the templates of one run show."""
    changed = [setting for setting in report.settings if setting.changed]
    return {
        "run": report,
        "tiles": tiles(report),
        "views": views([report]),
        "small": small_charts(report),
        "plot": "\n".join("".join(text for _, text in line) for line in terminal_plot(report, COLUMNS, ROWS)),
        "changed": changed,
        "unchanged": [setting for setting in report.settings if not setting.changed],
        "facts": facts(report),
    }


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """The figures at the head of a page: name, value, what it is counted in."""
    last, floor = report.last, report.floor
    found = [("validation loss", f"{last.val_loss:.4f}", "nats per token")] if last else []
    found += [("bits per byte", f"{last.val_bpb:.4f}", "of validation text")] if last else []
    found += [("above the floor", f"{floor.reached - floor.text:.4f}", "nats per character")] if floor else []
    found += [("training time", clock(report.seconds), in_sessions(report))]
    found += [("tokens", number(report.tokens), per_parameter(report))]
    found += [("speed", number(report.tokens_per_s), "tokens/s, median")] if report.tokens_per_s else []
    found += [("memory", size(report.peak_memory), "at the peak")] if report.peak_memory else []
    return found


def in_sessions(report: Report) -> str:
    return "in one session" if len(report.sessions) == 1 else f"in {len(report.sessions)} sessions"


def per_parameter(report: Report) -> str:
    return f"{few(report.tokens / report.parameters)} per parameter" if report.parameters else ""


def facts(report: Report) -> list[tuple[str, str]]:
    """What does not change while a run trains, and what it takes on disk."""
    started, versions = report.started, report.versions
    kept = [checkpoint for checkpoint in report.checkpoints if not checkpoint.damage]
    rows = [
        ("machine", started.get("machine", "")),
        ("device", started.get("device", "")),
        ("dataset", dataset_words(report)),
        ("budget", started.get("budget", "")),
        ("tokens a step", step_words(started) if started else ""),
        ("checkpoints", f"{len(kept)} kept, {size(sum(checkpoint.bytes for checkpoint in kept))}" if kept else "none"),
        ("folder", report.path),
        ("made by", f"SiliconLM {versions['siliconlm']}" if "siliconlm" in versions else ""),
    ]
    return [(name, words) for name, words in rows if words]


def step_words(started: dict[str, Any]) -> str:
    micro = f" x {started['accumulation']} micro-steps" if started["accumulation"] > 1 else ""
    return f"{started['tokens_per_step']:,} = {started['micro_batch']} x {started['context']:,}{micro}"


def dataset_words(report: Report) -> str:
    name, card = str(report.started.get("dataset", "")), report.card
    if card is None:
        return name and f"{name} (no longer there as it was)"
    splits, tokenizer = card["splits"], card["tokenizer"]
    train, val = number(splits["train"]["tokens"]), number(splits["val"]["tokens"])
    return (
        f"{name}: {train} training and {val} validation tokens, {tokenizer['kind']} tokenizer of {tokenizer['size']:,}"
    )


# --- charts ----------------------------------------------------------------------------------------------------------


def views(reports: Sequence[Report]) -> list[tuple[str, str, Chart]]:
    """The loss over tokens, over tokens in powers of ten, and over time: a word for the page, a name, the chart."""
    by_tokens = lines(reports, lambda curve: curve.tokens)
    by_time = lines(reports, lambda curve: curve.seconds)
    if not any(len(line.x) for line in by_tokens):
        return []
    first, last = min(ends(by_tokens, 0)), max(ends(by_tokens, -1))
    cut, whole = loss_axis(by_tokens, ceiling(smoothed(by_tokens))), loss_axis(by_tokens)
    made = [
        ("tokens", "tokens", chart(NATS, by_tokens, tokens_axis(last), cut)),
        ("log", "tokens, log scale", chart(NATS, by_tokens, tokens_axis(last, max(1, first)), whole)),
    ]
    if longest := max(ends(by_time, -1)):
        made.append(("time", "time", chart(NATS, by_time, time_axis(longest), cut)))
    return made


def ends(drawn: Iterable[Line], index: int) -> list[float]:
    return [line.x[index] for line in drawn if len(line.x)]


def smoothed(drawn: Iterable[Line]) -> list[Line]:
    return [line for line in drawn if line.style != "raw"]


def lines(reports: Sequence[Report], across: Callable[[Curve], Sequence[float]]) -> list[Line]:
    """The curves of a chart of losses: of one run with its single steps and its floor, of several each in a colour."""
    if len(reports) == 1:
        [report] = reports
        raw = Line("each step", "raw", across(report.loss), report.loss.values)
        return [
            raw,
            *run_lines(report, across, "training, smoothed", "train", "validation", "val"),
            *floor_line(report, across),
        ]
    drawn = []
    for index, report in enumerate(reports):
        colour = f"run-{index % COLOURS}"
        drawn += run_lines(report, across, report.run, f"{colour} thin", "", colour)
    return drawn


def run_lines(
    report: Report, across: Callable[[Curve], Sequence[float]], name: str, style: str, val_name: str, val_style: str
) -> list[Line]:
    loss, points = report.loss, evaluation_curve(report)
    words = [f"step {point.step:,}: {point.val_loss:.4f}" for point in report.evaluations]
    training = Line(name, style, across(loss), smooth(loss.values))
    return [training, Line(val_name, val_style, across(points), points.values, True, words)]


def evaluation_curve(report: Report) -> Curve:
    points = report.evaluations
    return Curve([p.tokens for p in points], [p.seconds for p in points], [p.val_loss for p in points])


def floor_line(report: Report, across: Callable[[Curve], Sequence[float]]) -> list[Line]:
    x = across(report.loss)
    if report.floor is None or not x:
        return []
    return [Line("entropy of the validation text", "floor", [x[0], x[-1]], [report.floor.per_token] * 2)]


def small_charts(report: Report) -> list[Chart]:
    """The learning rate, the speed and the memory over tokens."""
    wanted: list[tuple[str, Curve, Callable[[float], str]]] = [
        ("learning rate, as a share of its peak", report.learning_rate, "{:.2g}".format),
        ("tokens per second", report.speed, number),
        ("memory", report.memory, size),
    ]
    return [
        chart(
            name,
            [Line("", "train", curve.tokens, curve.values)],
            tokens_axis(curve.tokens[-1]),
            from_zero(curve.values, words),
        )
        for name, curve, words in wanted
        if curve.values
    ]


def terminal_plot(report: Report, columns: int, rows: int) -> list[list[tuple[str, str]]]:
    """The loss over tokens as lines of (style, characters); none where nothing was trained yet."""
    if not report.loss.values:
        return []
    training, validation = run_lines(report, lambda curve: curve.tokens, "", "train", "", "val")
    both = [training, validation]
    axis = loss_axis(both, ceiling(both))
    return drawing(training, validation, tokens_axis(max(ends(both, -1))), axis, columns, rows)


# --- runs side by side -----------------------------------------------------------------------------------------------


def compared(reports: Sequence[Report]) -> dict[str, Any]:
    """What the templates of a comparison show."""
    return {
        "runs": reports,
        "names": [report.run for report in reports],
        "rows": rows(reports),
        "views": views(reports),
        "settings": differing(reports),
    }


def rows(reports: Sequence[Report]) -> list[Row]:
    def row(name: str, words: Callable[[Report], str]) -> Row:
        return Row(name, [words(report) or "-" for report in reports])

    return [
        losses("validation loss (nats per token)", reports, "val_loss", same_data(reports)),
        losses("bits per byte", reports, "val_bpb", same_text(reports)),
        *score_rows(reports),
        row("state", lambda report: report.state),
        row("dataset", lambda report: str(report.started.get("dataset", ""))),
        row("parameters", lambda report: number(report.parameters)),
        row("shape", lambda report: report.shape),
        row("tokens", lambda report: number(report.tokens)),
        row("tokens per parameter", lambda report: few(report.tokens / report.parameters) if report.parameters else ""),
        row("steps", lambda report: f"{report.step:,}"),
        row("training time", lambda report: clock(report.seconds)),
        row("tokens/s (median)", lambda report: number(report.tokens_per_s)),
        row("memory at the peak", lambda report: size(report.peak_memory)),
        row("checkpoints", lambda report: size(sum(checkpoint.bytes for checkpoint in report.checkpoints))),
        row("device", lambda report: str(report.started.get("device", ""))),
        row("machine", lambda report: str(report.started.get("machine", ""))),
    ]


def losses(name: str, reports: Sequence[Report], field: str, comparable: bool) -> Row:
    """The last evaluations. The lowest is the best where all were made on the same."""
    values = [getattr(report.last, field) if report.last else math.inf for report in reports]
    lowest = min(values)
    best = {index for index, value in enumerate(values) if value == lowest < math.inf} if comparable else set()
    return Row(name, [f"{value:.4f}" if value < math.inf else "-" for value in values], frozenset(best))


def score_rows(reports: Sequence[Report]) -> list[Row]:
    """The last score of each run on each task."""
    scores = [{score["task"]: score for score in report.scores} for report in reports]
    tasks = dict.fromkeys(task for of_run in scores for task in of_run)
    return [score_row(task, [of_run.get(task) for of_run in scores]) for task in tasks]


def score_row(task: str, scores: Sequence[dict[str, Any] | None]) -> Row:
    shares = [score["correct"] / max(1, score["total"]) if score else -1.0 for score in scores]
    cells = [f"{score['correct']} of {score['total']}" if score else "-" for score in scores]
    return Row(task, cells, frozenset(index for index, share in enumerate(shares) if share == max(shares)))


def same_data(reports: Sequence[Report]) -> bool:
    """Whether all were trained and measured on the same tokens."""
    return len({report.data for report in reports}) == 1


def same_text(reports: Sequence[Report]) -> bool:
    """Whether all have the same validation text, whatever their tokenizers: bits per byte can then be compared."""
    recipes = [report.card["recipe"] if report.card else None for report in reports]
    if same_data(reports):
        return True
    return None not in recipes and len({(*r["files"], r["val_fraction"]) for r in recipes if r}) == 1


def differing(reports: Sequence[Report]) -> list[tuple[str, list[Setting]]]:
    """The settings in which the runs are not alike."""
    by_name = zip(*(report.settings for report in reports), strict=True)
    return [(row[0].name, list(row)) for row in by_name if len({str(setting.value) for setting in row}) > 1]
