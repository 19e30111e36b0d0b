"""Events on the terminal (Rich, on stderr), results on stdout, or JSON lines for programs. No decision is made here."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from siliconlm import config as configs
from siliconlm import events as ev
from siliconlm.cli.signals import Signals
from siliconlm.cli.words import clock, few, number, size
from siliconlm.errors import SiliconError, nearest
from siliconlm.hardware.diagnosis import Diagnosis

if TYPE_CHECKING:
    from siliconlm.cli.report import Report
    from siliconlm.data.vocabulary import Vocabulary


class Terminal(Console):
    def on_broken_pipe(self) -> None:
        raise  # for `main`, which ends quietly; Rich itself would end with exit code 1


WIDE = 200  # columns of a table that goes into a file or a pipe: a row is then a line
out = Terminal(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else WIDE)
err = Terminal(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
BACKGROUNDS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
PLOT = {"train": "blue", "val": "yellow", "axis": "dim"}
MARKS = {"pass": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


# --- words -----------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Model output for a terminal: control characters that could steer it become visible."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def as_json(record: Any) -> None:
    print(json.dumps(record), flush=True)


def notice(event: ev.Notice) -> None:
    err.print(Text(event.message, style="yellow" if event.level == "warning" else "dim"))


def choice(event: ev.Chosen) -> None:
    line = Text(f"{event.setting} = {event.value}  ", style="bold")
    err.print(line.append(Text(event.reason, style="not bold dim")))


def tell_measured(event: ev.Event) -> None:
    """A line for what is measured and chosen before training."""
    if isinstance(event, ev.Notice):
        notice(event)
    elif isinstance(event, ev.Chosen):
        choice(event)
    elif isinstance(event, ev.Probed):
        rate = f"{event.tokens_per_s:,.0f} tokens/s, {size(event.memory)}" if event.tokens_per_s else event.reason
        err.print(Text(f"  {probe_words(event)}: {event.verdict}, {rate}", style="dim"))


# --- commands --------------------------------------------------------------------------------------------------------


def doctor(diagnosis: Diagnosis, json_out: bool, tests: Iterable[ev.Tested] | None = None) -> bool:
    """The machine and its checks, then the self-test as it goes; returns whether all of that passed."""
    if json_out:
        told = [] if tests is None else [test.as_json() for test in tests]
        as_json(diagnosis.as_json() | ({} if tests is None else {"self_test": told}))
        return all(test["passed"] for test in told)
    out.print(machine_line(diagnosis), style="bold")
    out.print(doctor_table(diagnosis))
    passed = True
    for test in tests or ():
        passed &= test.passed
        tell_test(test)
    return passed


def tell_test(test: ev.Tested) -> None:
    mark, colour = MARKS["pass" if test.passed else "fail"]
    error = "no number" if test.error is None else f"{test.error:.1e}"
    line = Text.assemble(" ", (mark, colour), f"  {test.name:<26} error {error:>9}, limit {test.limit:.0e}")
    out.print(line)
    if not test.passed:
        out.print(Text(f"    {test.detail}\n    → {test.remedy}", style=colour))


def doctor_table(diagnosis: Diagnosis) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        mark, colour = MARKS[check.status]
        detail = Text(check.detail)
        if check.remedy:
            detail.append(f"\n→ {check.remedy}", style=colour)
        table.add_row(Text(mark, style=colour), check.name, detail)
    for item in diagnosis.choices:
        name = item.setting.rsplit(".", 1)[-1]
        table.add_row(Text("→", style="cyan"), name, f"{item.value}: {item.reason}")
    return table


def machine_line(diagnosis: Diagnosis) -> str:
    facts = diagnosis.facts
    cores = f"{facts.usable_cores} cores"
    if facts.cores_performance and facts.cores_efficiency:
        cores = f"{facts.cores_performance}+{facts.cores_efficiency} cores"
    gpu = (
        f", GPU {facts.gpu_name}" + (f" with {facts.gpu_cores} cores" if facts.gpu_cores else "")
        if facts.gpu_name
        else ""
    )
    return f"{facts.chip}, {cores}{gpu}, {facts.memory_total / 2**30:.0f} GiB, {facts.system} {facts.os_version}"


def prepare(events: Iterable[ev.Event], json_out: bool) -> None:
    for event in bars(events, json_out):
        if isinstance(event, ev.Prepared):
            if json_out:
                as_json(event.as_json())
                continue
            splits, tokenizer = event.card["splits"], event.card["tokenizer"]
            state = "is already prepared" if event.reused else "is ready"
            out.print(f"dataset {event.name} {state}: {event.path}")
            out.print(
                f"  {splits['train']['tokens']:,} training and {splits['val']['tokens']:,} validation tokens, "
                f"{tokenizer['kind']} tokenizer with {tokenizer['size']:,} entries"
            )
            chat = event.card.get("kind") == "chat"
            if chat:
                learned = splits["train"]["learned"]
                out.print(
                    f"  {splits['train']['documents']:,} conversations; {learned:,} tokens of answers are learned"
                )
            out.print(f"  next: silicon {'finetune' if chat else 'train'} --data {event.name}")
        elif isinstance(event, ev.Shown):
            shown(event, json_out)


def shown(event: ev.Shown, json_out: bool) -> None:
    """A conversation with what is learned in green, or in [[brackets]] where there are no colours."""
    if json_out:
        as_json(event.as_json())
        return
    text = Text()
    for piece, learned in event.pieces:
        words = printable(piece)
        text.append(words if out.is_terminal or not learned else f"[[{words}]]", "black on green" if learned else "dim")
    out.print(Text(event.place, style="bold"))
    out.print(text)


def written(events: Iterable[ev.Event], json_out: bool) -> None:
    for event in bars(events, json_out):
        if isinstance(event, ev.Written):
            if json_out:
                as_json(event.as_json())
            else:
                out.print(f"dataset {event.name} is written for {event.format}: {event.path}")
                out.print(f"  {', '.join(event.files)}")


def tokenizer(found: Vocabulary, json_out: bool) -> None:
    """What a tokenizer is, and its tokens side by side: in colours, or with bars between them."""
    if json_out:
        as_json(asdict(found))
        return
    out.print(f"{found.kind} tokenizer with {found.size:,} entries")
    if found.bytes_per_token is not None:
        out.print(f"  {found.bytes_per_token:.2f} bytes per token on {found.measured}")
    shown = [printable(piece).replace("\n", "↵\n") for piece in found.pieces]
    if not out.is_terminal:
        out.print(Text("|".join(shown)))
        return
    text = Text()
    for place, piece in enumerate(shown):
        text.append(piece, BACKGROUNDS[place % len(BACKGROUNDS)])
    out.print(text)


def bars(events: Iterable[ev.Event], quiet: bool) -> Iterator[ev.Event]:
    """Show notices and a progress bar for Working records; pass everything else on, with no bar on the screen."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    hidden = quiet or not err.is_terminal
    progress = Progress(*columns, console=err, transient=True, disable=hidden, redirect_stdout=False)
    tasks: dict[str, Any] = {}
    try:
        for event in events:
            if isinstance(event, ev.Working):
                amount = number(event.done) + (f" of {number(event.total)} {event.unit}" if event.total else "")
                if event.what not in tasks:
                    tasks[event.what] = progress.add_task(event.what, amount=amount)
                progress.start()
                progress.update(tasks[event.what], completed=event.done, total=event.total or None, amount=amount)
                continue
            progress.stop()
            if isinstance(event, ev.Notice):
                notice(event)
            else:
                yield event
    finally:
        progress.stop()


def probes(events: Iterable[ev.Event], json_out: bool) -> None:
    """The table of probes as it grows, then the choices."""
    rows: list[ev.Probed] = []
    choices: list[ev.Chosen] = []
    live = err.is_terminal and not json_out
    with Live(console=err, transient=True, auto_refresh=False, redirect_stdout=False) if live else nothing() as view:
        for event in bars(events, json_out):
            if isinstance(event, ev.Probed):
                rows.append(event)
                if live:
                    view.update(probe_table(rows), refresh=True)
                elif not json_out:
                    err.print(f"probed {probe_words(event)}: {event.verdict}")
            elif isinstance(event, ev.Chosen):
                choices.append(event)
    if json_out:
        as_json({"probes": [row.as_json() for row in rows], "choices": [item.as_json() for item in choices]})
        return
    out.print(probe_table(rows))
    for item in choices:
        out.print(
            Text(f"{item.setting} = {item.value}  ", style="bold").append(Text(item.reason, style="not bold dim"))
        )


def notices(events: Iterable[ev.Event], json_out: bool) -> None:
    """Results that are a sentence."""
    for event in events:
        if isinstance(event, ev.Notice):
            as_json(event.as_json()) if json_out else out.print(event.message)


def profiles(rows: list[dict[str, Any]], json_out: bool) -> None:
    if json_out:
        as_json({"profiles": rows})
        return
    if not rows:
        out.print("nothing is measured yet: silicon profile")
        return
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for name in ("model", "device", "power", "micro-batch", "dtype", "tokens/s", "file", "state"):
        right = name in ("micro-batch", "tokens/s")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name == "file")
    for row in rows:
        settings = row.get("settings", {})
        micro, dtype = settings.get("machine.micro_batch", "-"), settings.get("machine.dtype", "-")
        rate = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "-"
        cells = (str(row.get(name, "-")) for name in ("shape", "device", "power"))
        table.add_row(*cells, str(micro), str(dtype), rate, Path(row["file"]).name, row["state"])
    out.print(table)
    out.print(Text(f"in {Path(rows[0]['file']).parent}", style="dim"))


class nothing:
    """A `with` block without a live view."""

    def __enter__(self) -> Any:
        return None

    def __exit__(self, *_: object) -> None:
        pass


def probe_table(rows: list[ev.Probed]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for name in ("micro-batch", "tokens", "setting", "predicted", "measured", "tokens/s"):
        table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=name != "setting")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        predicted, measured = (size(count) if count else "-" for count in (row.predicted, row.memory))
        rate = f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "-"
        verdict = row.verdict + (f": {row.reason}" if row.reason else "")
        style = "green" if row.verdict == "fits" else "yellow"
        cells = (
            str(row.micro_batch),
            str(row.micro_batch * row.context),
            setting_words(row),
            predicted,
            measured,
            rate,
        )
        table.add_row(*cells, Text(verdict, style=style))
    return table


def setting_words(row: ev.Probed) -> str:
    return ", ".join(word for word in (row.dtype, row.variant) if word)


def probe_words(row: ev.Probed) -> str:
    return f"micro-batch {row.micro_batch} ({setting_words(row)})"


def plan(events: Iterable[ev.Event], json_out: bool) -> None:
    """The ladder of shapes, and the choice."""
    rows: list[ev.Planned] = []
    choices: list[ev.Chosen] = []
    for event in bars(events, json_out):
        if isinstance(event, ev.Planned):
            rows.append(event)
        elif isinstance(event, ev.Chosen):
            choices.append(event)
        elif not json_out:
            tell_measured(event)
    if json_out:
        as_json({"plan": [row.as_json() for row in rows], "choices": [item.as_json() for item in choices]})
        return
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for name in ("model", "size", "context", "tokens/s", "tokens", "passes", "memory", "val_loss"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        speed = f"{row.tokens_per_s:,.0f}" if row.measured else f"~{row.tokens_per_s:,.0f}"
        figures = (number(row.parameters), str(row.context), speed, number(row.tokens), few(row.passes))
        memory = ("" if row.measured else "~") + size(row.memory)
        style = "bold green" if row.chosen else ""
        name = ("→ " if row.chosen else "  ") + row.rung
        table.add_row(name, *figures, memory, f"{row.val_loss:.3f}", style=style)
    out.print(table)
    out.print(Text("~ between measured ones; val_loss is a prediction in nats per token", style="dim"))
    for item in choices:
        choice(item)


def dry_run(forecast: Iterable[ev.Event | configs.RunConfig], json_out: bool) -> None:
    """All resolved settings with their sources, and the shape of the run."""
    config = started = foreseen = None
    for event in forecast:
        if isinstance(event, configs.RunConfig):
            config = event
        elif isinstance(event, ev.Started):
            started = event
        elif isinstance(event, ev.Foreseen):
            foreseen = event
        elif isinstance(event, ev.Event) and not json_out:
            tell_measured(event)
    assert config is not None and started is not None and foreseen is not None
    flat = configs.flatten(config.model_dump(exclude_none=True), "config")
    if json_out:
        sources = {
            name: {"value": value, "source": config.sources.get(name, "default")} for name, value in flat.items()
        }
        as_json({"started": started.as_json(), "foreseen": foreseen.as_json(), "settings": sources})
        return
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, value in flat.items():
        table.add_row(Text(name, style="bold"), str(value), Text(config.sources.get(name, "default"), style="dim"))
    out.print(table)
    out.print(describe(started))
    out.print(forecast_table(foreseen))
    for hazard in foreseen.hazards:
        out.print(Text(hazard, style="yellow"))
    out.print("dry run: nothing was trained")


def forecast_table(foreseen: ev.Foreseen) -> Table:
    """What a run will take: time, tokens, memory and disk."""
    rate = foreseen.tokens_per_s
    time = "not measured" if foreseen.seconds is None else configs.duration(foreseen.seconds)
    if rate:
        time += f", evaluations included, at the measured {rate:,.0f} tokens/s"
    tokens = "not measured"
    if foreseen.tokens is not None and foreseen.passes is not None:
        passes = f"{foreseen.passes:.2g}" if foreseen.passes < 10 else f"{foreseen.passes:,.0f}"
        tokens = f"{number(foreseen.tokens)}, {passes} passes over the data"
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_row(Text("time", style="bold"), time)
    table.add_row(Text("tokens", style="bold"), tokens)
    table.add_row(Text("memory", style="bold"), f"about {size(foreseen.memory)} at the peak")
    free = "" if foreseen.disk_free is None else f", {size(foreseen.disk_free)} are free"
    table.add_row(Text("disk", style="bold"), f"at most {size(foreseen.disk)} of checkpoints{free}")
    return table


def describe(started: ev.Started) -> str:
    return (
        f"{number(started.parameters)} parameters on {started.device}, dataset {started.dataset}, {started.budget}: "
        f"{started.tokens_per_step:,} tokens a step = {started.micro_batch} x {started.context}"
        + (f" x {started.accumulation} micro-steps" if started.accumulation > 1 else "")
    )


def training(events: Iterable[ev.Event], json_out: bool, signals: Signals) -> bool:
    """Show a run; returns whether it was trained to the end. `signals` become polite once there is something to save.

    A terminal or reader that goes away stops the run, saved, as a signal would; it never ends it unsaved.
    """
    view = TrainingView(json_out)
    shown: Callable[[ev.Event], None] = view.take
    try:
        for event in events:
            signals.polite |= isinstance(event, ev.Started)
            try:
                shown(event)
            except OSError:
                signals.stop(signal.SIGPIPE)
                nobody_reads()
                shown = view.note
    finally:
        view.close()
    return view.finished is not None and view.finished.reason == "done"


STAGE_MARKS = {"done": ("✓", "green"), "running": ("▶", "cyan"), "waiting": ("·", "dim"), "stopped": ("■", "yellow")}


def road(events: Iterable[ev.Event], json_out: bool, signals: Signals) -> bool:
    """A line for each stage as it begins and ends, and in between what it does; whether the end was reached."""
    view, states = TrainingView(json_out), {}
    try:
        for event in bars(events, json_out or not err.is_terminal):
            signals.polite = isinstance(event, ev.Started) or (signals.polite and not isinstance(event, ev.Staged))
            if isinstance(event, ev.Staged):
                states = event.states
                view.close()
                view = TrainingView(json_out)
                if json_out:
                    as_json(event.as_json())
                elif event.stage:
                    tell_stage(event)
            elif not json_out and isinstance(event, ev.Prepared | ev.Scored):
                tell_made(event)
            else:
                view.take(event)
    finally:
        view.close()
    done = all(state == "done" for state in states.values())
    if done and not json_out:
        out.print("the end of the road: silicon chat")
    return done


def tell_stage(event: ev.Staged) -> None:
    strip = Text()
    for stage, state in event.states.items():
        mark, colour = STAGE_MARKS[state]
        strip.append(f"{mark} {stage}  ", style=f"bold {colour}" if stage == event.stage else colour)
    err.print(strip.append(event.detail, style="not bold dim"))


def tell_made(event: ev.Event) -> None:
    if isinstance(event, ev.Prepared):
        tokens = event.card["splits"]["train"]["tokens"]
        err.print(Text(f"dataset {event.name}: {tokens:,} training tokens", style="dim"))
    elif isinstance(event, ev.Scored):
        out.print(f"  {event.task}: {event.correct} of {event.total} answers right ({event.correct / event.total:.0%})")


def nobody_reads() -> None:
    """Let everything that is still written go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


class TrainingView:
    """Two lines that fit in 80 columns: a bar with the time left, and the figures."""

    def __init__(self, json_out: bool) -> None:
        self.json_out = json_out
        self.progress: ev.Progress | None = None
        self.evaluated: ev.Evaluated | None = None
        self.finished: ev.Finished | None = None
        self.working: ev.Working | None = None
        self.smooth: float | None = None
        self.live: Live | None = None

    def take(self, event: ev.Event) -> None:
        """Show an event: as a line of JSON, or as lines above the live ones."""
        self.note(event)
        if self.json_out:
            as_json(event.as_json())
            return
        if self.live is None and err.is_terminal:
            self.live = Live(self, console=err, refresh_per_second=4, transient=True, redirect_stdout=False)
            self.live.start()
        if isinstance(event, ev.Finished):
            self.close()
            finish(event)
        else:
            self.tell(event)

    def close(self) -> None:
        """Give the screen back."""
        if self.live:
            with suppress(OSError):
                self.live.stop()
            self.live = None

    def note(self, event: ev.Event) -> None:
        """Remember what the live lines show."""
        self.working = event if isinstance(event, ev.Working) else None
        if isinstance(event, ev.Step):
            self.smooth = event.loss if self.smooth is None else 0.9 * self.smooth + 0.1 * event.loss
        elif isinstance(event, ev.Progress):
            self.progress = event
        elif isinstance(event, ev.Evaluated):
            self.evaluated = event
        elif isinstance(event, ev.Finished):
            self.finished = event

    def tell(self, event: ev.Event) -> None:
        if isinstance(event, ev.Notice | ev.Chosen | ev.Probed):
            tell_measured(event)
        elif isinstance(event, ev.Started):
            err.print(describe(event))
            err.print(Text(f"run {event.run}: {event.path}", style="dim"))
        elif isinstance(event, ev.Resumed):
            err.print(f"resumed from step {event.step:,}")
        elif isinstance(event, ev.Evaluated):
            whole = "  on the whole validation split" if event.complete else ""
            loss = f"{self.smooth:.4f}" if self.smooth is not None else "-"
            err.print(f"step {event.step:>6,}  loss {loss}  val_loss {event.val_loss:.4f}{whole}")
        elif isinstance(event, ev.Saved):
            err.print(Text(f"saved step {event.step:,} ({size(event.bytes)})", style="dim"))

    def __rich__(self) -> Group:
        now = self.progress
        if now is None:
            return Group(Text("getting ready ...", style="dim"))
        width = 30
        filled = round(now.done * width)
        bar = Text("━" * filled, style="green") + Text("━" * (width - filled), style="dim")
        first = Text.assemble(
            bar, f" {now.done:4.0%}  step {now.step:,}  {clock(now.seconds)} + {clock(now.seconds_left)} left"
        )
        loss = self.smooth if self.smooth is not None else now.loss
        val = f"  val {self.evaluated.val_loss:.4f}" if self.evaluated else ""
        if self.working and self.working.total:
            return Group(first, Text(f"evaluating: {self.working.done / self.working.total:.0%}"))
        return Group(first, Text(f"loss {loss:.4f}{val}  {number(now.tokens_per_s)} tokens/s  {size(now.memory)}"))


def finish(event: ev.Finished) -> None:
    done = event.reason == "done"
    out.print(
        f"run {event.run} {'is done' if done else f'stopped by {event.reason}'}: step {event.step:,}, "
        f"{number(event.tokens)} tokens in {clock(event.seconds)}"
    )
    if event.val_loss is not None:
        part = "" if event.complete else " (on a part of the validation split: silicon eval uses all)"
        out.print(f"  val_loss {event.val_loss:.4f} nats/token, {event.val_bpb:.4f} bits/byte{part}")
    if done:
        out.print(f'  next: silicon sample "To be or not" --run {event.run}')
    else:
        out.print(f"  go on with: silicon resume {event.run}")


def sampling(events: Iterable[ev.Event], prompt: str, json_out: bool) -> None:
    """The prompt and what follows, as it comes; the counts go to stderr.

    Several texts come at once: the first unfinished one is shown as it grows, the others when their turn has come.
    """
    texts: dict[int, str] = {}
    counts: dict[int, dict[str, Any]] = {}
    shown, turn = 0, 0
    show = printable if sys.stdout.isatty() else str
    seconds = 0.0
    for event in bars(events, json_out):
        if not isinstance(event, ev.Sampled):
            continue
        texts[event.sample] = texts.get(event.sample, prompt) + event.text
        if event.done:
            seconds = event.seconds
            facts = {"tokens": event.tokens, "stopped_by": event.stopped_by}
            counts[event.sample] = {"text": texts[event.sample], **facts}
        while not json_out and turn in texts:
            if turn and not shown:
                print("\n---\n")
            print(show(texts[turn][shown:]), end="\n" if turn in counts else "", flush=True)
            shown = len(texts[turn])
            if turn not in counts:
                break
            turn, shown = turn + 1, 0
    total = sum(item["tokens"] for item in counts.values())
    rate = total / seconds if seconds else 0.0
    if json_out:
        samples = [counts[index] for index in sorted(counts)]
        as_json({"prompt": prompt, "samples": samples, "tokens_per_s": round(rate, 1)})
    else:
        err.print(Text(f"{total} tokens, {rate:.0f} tokens/s", style="dim"))


def serving(events: Iterable[ev.Event], json_out: bool) -> None:
    """Where a server answers, for as long as it does."""
    for event in bars(events, json_out):
        if not isinstance(event, ev.Serving):
            continue
        if json_out:
            as_json(event.as_json())
            continue
        out.print(f"{event.model} on {event.device}: {event.url}")
        talk = "open it in a browser, or" if event.chat else "not tuned on conversations: it continues texts;"
        err.print(Text(f"{talk} point programs at {event.url}/v1; Ctrl-C ends it", style="dim"))


def evaluation(events: Iterable[ev.Event], json_out: bool) -> None:
    for event in bars(events, json_out):
        if isinstance(event, ev.Evaluated):
            if json_out:
                as_json({name: value for name, value in event.as_json().items() if name != "event"})
            else:
                out.print(
                    f"step {event.step:,}: val_loss {event.val_loss:.4f} nats/token, {event.val_bpb:.4f} bits/byte"
                )
                out.print(f"  {event.tokens:,} tokens, the whole validation split, in {event.seconds:.1f} s")
        elif isinstance(event, ev.Scored | ev.Measured) and json_out:
            as_json(event.as_json())
        elif isinstance(event, ev.Measured):
            out.print(f"{event.task}: {event.metric} {event.value:.4f}  ({event.total:,} questions)")
        elif isinstance(event, ev.Scored) and not json_out:
            share = event.correct / max(1, event.total)
            out.print(f"  {event.task}: {event.correct} of {event.total} answers right ({share:.0%})")


def runs(rows: list[dict[str, Any]], json_out: bool) -> None:
    if json_out:
        as_json({"runs": rows})
        return
    if not rows:
        out.print("no runs yet: silicon train")
        return
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("run", overflow="fold", style="bold")
    for name in ("dataset", "preset", "size", "step", "budget", "val_loss", "state"):
        table.add_column(name, justify="right" if name in ("size", "step", "budget", "val_loss") else "left")
    for row in rows:
        val = f"{row['val_loss']:.4f}" if row.get("val_loss") else "-"
        parameters = number(row["parameters"]) if row.get("parameters") else "-"
        cells = (row["run"], row.get("dataset", "-"), row.get("preset", "-"), parameters)
        table.add_row(*cells, f"{row.get('step', 0):,}", row.get("budget", "-"), val, row["state"])
    out.print(table)


def run(report: Report, plot: Sequence[Sequence[tuple[str, str]]], json_out: bool) -> None:
    """One run: its figures, the plot where one was asked for, its checkpoints and the stages that led to it."""
    if json_out:
        as_json(report.as_json())
        return
    out.print(Text(f"{report.run}: {report.state_words}", style="bold"))
    out.print(Text(report.sentence))
    if plot:
        out.print(Text.assemble(("━", PLOT["train"]), " training loss, smoothed   ", ("●", PLOT["val"]), " validation"))
    for line in plot:
        out.print(Text.assemble(*((text, PLOT.get(style, "")) for style, text in line)), soft_wrap=True)
    for kept in report.checkpoints:
        loss = "not evaluated" if kept.val_loss is None else f"val_loss {kept.val_loss:.4f}"
        words = kept.damage or f"{size(kept.bytes)}, {loss}{', the best' if kept.best else ''}"
        out.print(Text(f"  checkpoint {kept.step:,}: {words}", style="dim"))
    for stage in report.stages if len(report.stages) > 1 else []:
        out.print(Text(f"  stage {stage.run}: {stage.words}"))


def plot_size() -> tuple[int, int]:
    """Columns and rows of a plot: the terminal's width, 80 elsewhere."""
    return (out.width if out.is_terminal else 80), 16


def report(reports: Sequence[Report], pages: Sequence[Path], json_out: bool) -> None:
    """Where the pages of a report are."""
    if json_out:
        as_json({"pages": [str(page) for page in pages], "runs": [report.as_json() for report in reports]})
        return
    for page in pages:
        out.print(f"written: {page}")


def settings(section: str, json_out: bool) -> None:
    known = {name: field for name, field in configs.known_settings().items() if name.startswith(section)}
    if not known:
        sections = sorted({name.split(".")[0] for name in configs.known_settings()})
        raise SiliconError(
            f"no section {section}", fix=nearest(section, sections) or f"There are: {', '.join(sections)}."
        )
    if json_out:
        as_json({name: {"default": field.default, "help": field.description} for name, field in known.items()})
        return
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, field in known.items():
        default = "-" if field.default is None else str(field.default)
        table.add_row(Text(name, style="bold"), default, Text(field.description or "", style="dim"))
    out.print(table)
