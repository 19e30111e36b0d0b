"""Reports as pages: one HTML file that needs no other, and the same in Markdown. Templates lie in `pages`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from siliconlm import __version__
from siliconlm.cli.charts import losses, over_tokens, terminal_plot
from siliconlm.cli.report import Evaluation, Report, Setting
from siliconlm.cli.words import clock, few, number, size
from siliconlm.errors import SiliconError
from siliconlm.files import write_file

TEMPLATES = Path(__file__).parent / "pages"
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
    """The file of one of the two pages; the other has its name, with the other suffix."""
    path = Path(output).expanduser() if output else default
    if path.suffix in (".html", ".md") and not path.is_dir():
        return path
    if path.is_file():
        fix = "Name a folder, or a file like run.html."
        raise SiliconError(f"--output {output} is a file, and no page", fix=fix)
    return path / f"{name}.html"


# --- templates -------------------------------------------------------------------------------------------------------


def html_pages() -> Environment:
    return _environment(autoescape=True)


def markdown_pages() -> Environment:
    return _environment(finalize=plain_markdown)


def _environment(**options: Any) -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    made.filters |= {"clock": clock, "number": number, "size": size, "moment": moment, "fenced": fenced, "code": code}
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
        "views": losses([report]),
        "small": over_tokens(report),
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
    made = f"{tokenizer['kind']} tokenizer with {tokenizer['size']:,} entries"
    return f"{name}: {train} training and {val} validation tokens, {made}"


# --- runs side by side -----------------------------------------------------------------------------------------------


def compared(reports: Sequence[Report]) -> dict[str, Any]:
    """What the templates of a comparison show."""
    return {
        "runs": reports,
        "names": [report.run for report in reports],
        "rows": rows(reports),
        "views": losses(reports),
        "settings": differing(reports),
    }


def rows(reports: Sequence[Report]) -> list[Row]:
    def row(name: str, words: Callable[[Report], str]) -> Row:
        return Row(name, [words(report) or "-" for report in reports])

    return [
        loss_row("validation loss (nats per token)", reports, "val_loss", same_data(reports)),
        loss_row("bits per byte", reports, "val_bpb", same_text(reports)),
        *score_rows(reports),
        row("state", lambda report: report.state_words),
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


def loss_row(name: str, reports: Sequence[Report], field: str, comparable: bool) -> Row:
    """The last evaluations. The lowest is the best where all were made on the same."""
    values = [getattr(report.last, field) if report.last else math.inf for report in reports]
    lowest = min(values)
    best = {index for index, value in enumerate(values) if value == lowest < math.inf} if comparable else set()
    return Row(name, [loss_words(report.last, field) for report in reports], frozenset(best))


def loss_words(last: Evaluation | None, field: str) -> str:
    if last is None:
        return "-"
    return f"{getattr(last, field):.4f}" + ("" if last.complete else " on a part")


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
    return same_data(reports) or len({recipe_of_text(report) for report in reports}) == 1


def recipe_of_text(report: Report) -> str:
    """What the text of a run's dataset is made of; of one that is gone nothing is known, not even that it is like
    another's."""
    if report.card is None:
        return report.path
    recipe = {name: value for name, value in report.card["recipe"].items() if name not in ("tokenizer", "vocab_size")}
    return json.dumps(recipe, sort_keys=True)


def differing(reports: Sequence[Report]) -> list[tuple[str, list[Setting]]]:
    """The settings in which the runs are not alike."""
    by_name = zip(*(report.settings for report in reports), strict=True)
    return [(row[0].name, list(row)) for row in by_name if len({str(setting.value) for setting in row}) > 1]
