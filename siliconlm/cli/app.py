"""The `silicon` command: each function parses, calls one engine function, renders and exits. No torch up here."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

from siliconlm import __version__
from siliconlm.cli import options
from siliconlm.errors import SiliconError, from_os_error

if TYPE_CHECKING:
    from siliconlm.config import Layer, MachineConfig
    from siliconlm.engine import Request
    from siliconlm.events import Chosen, Event

app = typer.Typer(
    name="silicon",
    help="Train a language model on the computer on your desk: measured settings, exact resume, nothing lost.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: silicon doctor; silicon train --time 60s; silicon sample 'To be or not'",
)


# Older Typers use click, newer ones carry a copy of it: the class of usage errors is found through the one they share.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def main() -> NoReturn:
    """Run the command line. Exit 0 done, 1 something you can fix, 2 usage, 128 + signal when stopped by one."""
    try:
        with typer.main.get_command(app).make_context("silicon", sys.argv[1:]) as context:
            context.command.invoke(context)
            sys.stdout.flush()  # a reader that is gone shows here, not at the interpreter's end
        sys.exit(0)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "silicon"
        _fail(SiliconError(error.format_message(), fix=f"See {command} --help.", kind="usage"), 2)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: end without a traceback
        sys.exit(0)
    except SiliconError as error:
        _fail(error)
    except OSError as error:
        _fail(from_os_error(error))


def _fail(error: SiliconError, code: int = 1) -> NoReturn:
    where = f" ({error.where})" if error.where else ""
    print(_line(f"error: {error.what}{where}"), file=sys.stderr)
    if error.fix:
        print(_line(f"  {error.fix}"), file=sys.stderr)
    if "--json" in sys.argv[1:]:
        message = {"error": error.what, "where": error.where, "fix": error.fix, "kind": error.kind}
        print(json.dumps(message))
    sys.exit(code)


def _line(text: str) -> str:
    """A name out of a file or an argument may hold line ends and escape codes: they are shown, not sent."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"silicon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(epilog="Example: silicon doctor --json")
def doctor(
    device: options.Device = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Hold its arithmetic against the CPU's.")] = False,
    json_out: options.Json = False,
) -> None:
    """Check this machine, with a remedy for what is wrong.

    Shows the facts, the checks, and the device and precision a run would take, with the reasons.
    """
    from siliconlm.cli import render
    from siliconlm.hardware.diagnosis import diagnose

    def choose(machine: MachineConfig) -> list[Chosen]:
        from siliconlm import engine  # torch, which the doctor must do without where it is broken

        return engine.device_choices(machine)

    diagnosis = diagnose(choose, device)
    if self_test and diagnosis.torch.version:
        from siliconlm import engine

        sound = render.doctor(diagnosis, json_out, engine.self_test(device))
    else:
        sound = render.doctor(diagnosis, json_out)
    raise typer.Exit(0 if diagnosis.healthy and sound else 1)


@app.command(epilog="Example: silicon prepare my-notes/ --name notes --tokenizer bpe --vocab-size 4096")
def prepare(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE", help="Files, folders, globs, hf://..., or shakespeare. [default: built-in corpus]"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="N", help="Name of the dataset. [default: from SOURCE]")] = None,
    field: Annotated[str | None, typer.Option(metavar="F", help="Where a record's text is. [default: text]")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="T", help="byte, char, bpe, a tokenizer.json, or hf://OWNER/NAME. [default: byte]"),
    ] = None,
    vocab_size: Annotated[int, typer.Option(metavar="V", help="Size of a bpe vocabulary.")] = 4096,
    val_fraction: Annotated[float, typer.Option(metavar="F", help="Share of the text kept for validation.")] = 0.1,
    force: Annotated[bool, typer.Option("--force", help="Replace a dataset of the same name.")] = False,
    template: Annotated[
        str | None, typer.Option(metavar="T", help="Of conversations: chatml, nanochat, llama3, or a Jinja file.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="RUN", help="Of conversations: the model that they are for.")
    ] = None,
    show_mask: Annotated[
        bool, typer.Option("--show-mask", help="Only show some conversations, and what is learned of them.")
    ] = False,
    write: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Write the dataset SOURCE as files of nanogpt or llmc.")
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Where to write them.")] = None,
    json_out: options.Json = False,
) -> None:
    """Turn text into tokens on disk.

    Reads text files, and JSON Lines, JSON and Parquet files, in which each record is a text. SOURCE can also be
    hf://datasets/OWNER/NAME[/SPLIT], from the Hugging Face hub, or a folder of token files of nanoGPT, llm.c,
    modded-nanogpt or TinyRecursiveModels, which are taken as they are. Files of conversations, and chat (built in),
    become a dataset for silicon finetune.
    """
    from siliconlm import engine
    from siliconlm.cli import render

    if write or output:
        render.written(_write(source or [], write, output), json_out)
        return
    asked = engine.Preparation(
        tuple(source or [engine.BUILTIN]), name, tokenizer, vocab_size, val_fraction, force, field, template, base
    )
    render.prepare(engine.prepare_sources(asked, show_mask), json_out)


@app.command(epilog="Example: silicon tokenizer shakespeare 'To be, or not to be'")
def tokenizer(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A dataset, a run, a tokenizer.json, or hf://OWNER/NAME."),
    ] = None,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Text to cut. [default: validation text]")] = None,
    json_out: options.Json = False,
) -> None:
    """Show a tokenizer, and how it cuts a text.

    Its size, the bytes a token stands for on average, and the tokens in colours. Without SOURCE it is the one dataset's
    there is.
    """
    from siliconlm.cli import render
    from siliconlm.data.vocabulary import describe

    render.tokenizer(describe(*_tokenizer_of(source), text), json_out)


@app.command("probe-batch", epilog="Example: silicon probe-batch --preset small --data shakespeare")
def probe_batch(
    data: options.Data = None,
    preset: options.Preset = None,
    assignments: options.Set = None,
    device: options.Device = None,
    limit: options.Seconds = "60s",
    json_out: options.Json = False,
) -> None:
    """Try growing micro-batches with real training steps.

    Each runs in a child process, so running out of memory costs nothing. Stops before the memory limit.
    """
    from siliconlm import engine
    from siliconlm.cli import render

    request = _request(data, preset, "none", assignments, {"machine.device": device})
    render.probes(engine.probe_batch(request, _seconds("--limit", limit)), json_out)


@app.command(epilog="Example: silicon profile --preset small --data shakespeare")
def profile(
    data: options.Data = None,
    preset: options.Preset = None,
    assignments: options.Set = None,
    device: options.Device = None,
    limit: options.Seconds = "60s",
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="FILE", help="Write what was measured to FILE, for --profile FILE."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show all that was measured, for any model.")] = False,
    json_out: options.Json = False,
) -> None:
    """Measure the best settings for a model and keep them.

    Micro-batch, precision, threads, loss in chunks, checkpointing and compiling, by real training steps in child
    processes. The fastest that fits in memory wins; of equals the smallest.
    """
    from pathlib import Path

    from siliconlm import engine
    from siliconlm.cli import render

    request = _request(data, preset, "none", assignments, {"machine.device": device})
    if list_:
        render.profiles(engine.list_profiles(device), json_out)
    elif export:
        render.notices(engine.export_profile(request, Path(export)), json_out)
    else:
        render.probes(engine.profile(request, _seconds("--limit", limit), refresh), json_out)


@app.command(epilog="Example: silicon plan --time 30m --data shakespeare")
def plan(
    time: Annotated[str | None, typer.Option(metavar="TIME", help="Time to train: 90s, 30m, 2h.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Or train until 07:00.")] = None,
    data: options.Data = None,
    assignments: options.Set = None,
    device: options.Device = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    json_out: options.Json = False,
) -> None:
    """Choose a model size for a time: the best that this machine can train in it.

    Measures a few sizes for seconds each (once), and predicts the loss that each would reach. `silicon train --time`
    without --preset does the same.
    """
    from siliconlm import engine
    from siliconlm.cli import render

    flags = {"train.time": time, "train.until": until, "machine.device": device}
    render.plan(engine.plan(_request(data, None, "none", assignments, flags), refresh), json_out)


@app.command(epilog="Example: silicon train --data shakespeare --preset tiny --time 2m --name first")
def train(
    data: options.Data = None,
    preset: options.Preset = None,
    profile: Annotated[
        str, typer.Option(metavar="P", help="auto (measure once), none, a profile's name, or a TOML file.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(metavar="N", help="Train for N steps.")] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Train for N tokens.")] = None,
    time: Annotated[str | None, typer.Option(metavar="TIME", help="Train for a time: 90s, 30m, 2h.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Train until 07:00, or '2026-11-22 07:00'.")] = None,
    name: Annotated[str | None, typer.Option(metavar="RUN", help="Name of the run.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Decides weights, data order and dropout.")] = None,
    assignments: options.Set = None,
    device: options.Device = None,
    on_battery: options.OnBattery = None,
    track: options.Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show all settings, and what it will take.")] = False,
    json_out: options.Json = False,
) -> None:
    """Train a model. Ctrl-C saves; `silicon resume` goes on exactly."""
    from siliconlm import engine
    from siliconlm.cli import render
    from siliconlm.cli.signals import Signals

    flags: dict[str, object] = {"train.steps": steps, "train.tokens": tokens, "train.time": time}
    flags |= {"train.until": until, "train.seed": seed, "machine.device": device, "machine.on_battery": on_battery}
    request = _request(data, preset, profile, assignments, flags)
    if dry_run:
        render.dry_run(engine.forecast(request), json_out)
        return
    with Signals() as signals:
        events = _tracked(engine.train(request, name, signals.reason), track)
        done = render.training(events, json_out, signals)
    raise typer.Exit(0 if done else signals.exit_code)


@app.command(epilog="Example: silicon resume first --extend 30m")
def resume(
    run: options.Run = None,
    extend: Annotated[
        str | None, typer.Option(metavar="TIME", help="Give it more time; a finished run warms up again.")
    ] = None,
    device: options.Device = None,
    on_battery: Annotated[
        str | None, typer.Option(metavar="DO", help="continue or pause. [default: as the run was begun]")
    ] = None,
    track: options.Track = None,
    json_out: options.Json = False,
) -> None:
    """Go on exactly where a stopped run was saved."""
    from siliconlm import engine
    from siliconlm.cli import render
    from siliconlm.cli.signals import Signals

    extra = None if extend is None else _seconds("--extend", extend)
    with Signals() as signals:
        events = _tracked(engine.resume(run, signals.reason, device, extra, on_battery), track)
        done = render.training(events, json_out, signals)
    raise typer.Exit(0 if done else signals.exit_code)


@app.command(epilog="Example: silicon finetune first --data chat.jsonl --epochs 3")
def finetune(
    base: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run or model folder. [default: the latest run]")
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="D", help="Conversations: a dataset, a file, a folder, or chat (built in).")
    ] = "chat",
    template: Annotated[
        str | None, typer.Option(metavar="T", help="chatml, nanochat, llama3, or a Jinja file. [default: what fits]")
    ] = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", help="Passes over the data. [default: 3]")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Or train for N steps.")] = None,
    time: Annotated[str | None, typer.Option(metavar="TIME", help="Or for a time: 90s, 30m, 2h.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Or until 07:00.")] = None,
    name: Annotated[str | None, typer.Option(metavar="RUN", help="Name of the new run.")] = None,
    profile: Annotated[
        str, typer.Option(metavar="P", help="auto (measure once), none, a profile's name, or a TOML file.")
    ] = "auto",
    assignments: options.Set = None,
    device: options.Device = None,
    json_out: options.Json = False,
) -> None:
    """Teach a trained model to talk, or go on with other text.

    Of conversations the answers alone are learned. The base stays as it is; `silicon resume` goes on exactly.
    """
    from siliconlm import engine
    from siliconlm.cli import render
    from siliconlm.cli.signals import Signals

    flags = {"train.steps": steps, "train.time": time, "train.until": until, "machine.device": device}
    request = _request(None, None, profile, assignments, flags)
    with Signals() as signals:
        work = engine.finetune(request, base, data, template, epochs, name, signals.reason)
        done = render.training(work, json_out, signals)
    raise typer.Exit(0 if done else signals.exit_code)


@app.command(epilog="Example: silicon sample 'To be or not' --max-tokens 200 --temperature 0.7")
def sample(
    prompt: Annotated[str, typer.Argument(help="Text to continue. Empty starts a new document.")] = "",
    run: Annotated[
        str | None, typer.Option(metavar="R", help="A run or model folder. [default: the latest run]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Most tokens to make. [default: 300]")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 always takes the likeliest. [default: 0.8]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Keep the K likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Keep the likeliest tokens up to probability P.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(metavar="P", help="Drop tokens under P of the likeliest's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(metavar="X", help="Above 1 repeats less.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same text.")] = None,
    num_samples: Annotated[int | None, typer.Option(metavar="N", help="How many continuations. [default: 1]")] = None,
    step: options.Step = None,
    device: options.Device = None,
    json_out: options.Json = False,
) -> None:
    """Continue a text with a trained model."""
    from siliconlm import engine
    from siliconlm.cli import render
    from siliconlm.config import sampling

    settings = sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
        num_samples=num_samples,
    )
    render.sampling(engine.sample(prompt, run, settings, device, _step(step)), prompt, json_out)


@app.command(epilog="Example: silicon chat first --prompt 'What is 17 + 25?'")
def chat(
    run: options.Run = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Ask this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="How the model is to behave.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of an answer. [default: 300]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 always takes the likeliest. [default: 0.8]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Keep the likeliest tokens up to probability P.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same answers.")] = None,
    template: Annotated[
        str | None, typer.Option(metavar="T", help="chatml, nanochat, llama3, or a Jinja file. [default: the model's]")
    ] = None,
    step: options.Step = None,
    device: options.Device = None,
    json_out: options.Json = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; /help shows what else there is.

    Without a terminal each line of standard input is a message, and only the answers are printed.
    """
    from siliconlm import engine
    from siliconlm.cli import chat as face
    from siliconlm.config import sampling

    settings = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    face.chat(engine.talk(run, settings, device, _step(step), template), prompt, system, json_out)


@app.command(epilog="Example: silicon serve first --port 8080")
def serve(
    run: options.Run = None,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(metavar="H", help="Another address than this computer's own lets others in.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(metavar="T", envvar="SILICON_TOKEN", help="What clients must show (a bearer token).")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="T", help="chatml, nanochat, llama3, or a Jinja file. [default: the model's]")
    ] = None,
    device: options.Device = None,
    json_out: options.Json = False,
) -> None:
    """Serve a model to a browser, and to programs by OpenAI's API.

    Several texts are made at once. Ctrl-C ends it.
    """
    try:
        from siliconlm.server import app as face
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn"):
            raise
        fix = "Type: pip install 'siliconlm[serve]'"
        raise SiliconError(
            f"serving needs {missing}, which is not installed", fix=fix, kind="bad_environment"
        ) from None
    from siliconlm.cli import render
    from siliconlm.cli.signals import Signals

    with Signals():
        render.serving(face.serve(run, host, port, token, device, template), json_out)


@app.command("eval", epilog="Example: silicon eval first --json")
def evaluate(
    run: options.Run = None,
    data: options.Data = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness instead: hellaswag,arc_easy or a .yaml."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most N questions of each task.")] = None,
    step: options.Step = None,
    device: options.Device = None,
    json_out: options.Json = False,
) -> None:
    """Measure the loss on the whole validation split.

    In nats per token, and in bits per byte, which can be compared between tokenizers. Of a model that talks: over its
    answers alone, with the answers that are right to the letter on the built-in set's held-out questions.
    """
    from siliconlm import engine
    from siliconlm.cli import render

    if tasks:
        words = [word for word in tasks.split(",") if word]
        render.evaluation(engine.measure_tasks(run, words, limit, device, _step(step)), json_out)
        return
    render.evaluation(engine.validate(run, data, device, _step(step)), json_out)


@app.command(epilog="Example: silicon run quick; silicon run overnight --until 07:00 --data notes/")
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="quick, overnight, or a TOML file.")] = "quick",
    time: Annotated[str | None, typer.Option(metavar="TIME", help="For the whole road: 10m, 2h.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Or until 07:00.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Text in place of the recipe's. Repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="N", help="What is made is called so. [default: RECIPE]")] = None,
    json_out: options.Json = False,
) -> None:
    """Go the whole road: from text to a model that talks.

    Prepare, train, finetune, evaluate, export. Stopped anywhere, the same command goes on; finished stages whose
    inputs have not changed are passed by.
    """
    from siliconlm import road
    from siliconlm.cli import render
    from siliconlm.cli.signals import Signals

    if time and until:
        raise SiliconError("--time and --until are both given; a road has one budget", kind="usage")
    seconds = None if time is None else _seconds("--time", time)
    with Signals() as signals:
        work = road.travel(recipe, name, seconds, until, tuple(data or ()), signals.reason)
        done = render.road(work, json_out, signals)
    raise typer.Exit(0 if done else signals.exit_code)


@app.command(epilog="Example: silicon runs first --plot")
def runs(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="One run by name or folder. [default: all]")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the loss of RUN, or of the latest run.")] = False,
    json_out: options.Json = False,
) -> None:
    """A table of all runs, or one run's figures, checkpoints and stages."""
    from siliconlm import engine
    from siliconlm.cli import charts, render
    from siliconlm.cli.report import read_report

    if run is None and not plot:
        render.runs(engine.runs(), json_out)
        return
    found = read_report(run)
    render.run(found, charts.terminal_plot(found, *render.plot_size()) if plot else [], json_out)


@app.command(epilog="Example: silicon report first second --output side-by-side.html")
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="Runs by name or folder. [default: the latest]")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A file (.html, .md) or folder. [default: the run's; for several, this one]"),
    ] = None,
    json_out: options.Json = False,
) -> None:
    """Write a page about a run, in HTML and Markdown; several runs are laid side by side.

    The HTML page needs no other file and no network.
    """
    from siliconlm.cli import page, render
    from siliconlm.cli.report import read_report

    reports = [read_report(name) for name in runs] if runs else [read_report(None)]
    render.report(reports, page.write_pages(reports, output), json_out)


@app.command(epilog="Example: silicon settings train")
def settings(
    section: Annotated[str, typer.Argument(help="model, data, train, optim or machine. [default: all]")] = "",
    json_out: options.Json = False,
) -> None:
    """List every setting for --set, with its default."""
    from siliconlm.cli import render

    render.settings(section, json_out)


def _write(source: list[str], format: str | None, output: str | None) -> Iterator[Event]:
    from pathlib import Path

    from siliconlm.data.write import write_tokens

    if len(source) != 1 or not format or not output:
        fix = "Type: silicon prepare DATASET --write nanogpt --output DIR"
        raise SiliconError("--write takes one dataset and --output", fix=fix)
    return write_tokens(source[0], format, Path(output).expanduser())


def _tokenizer_of(source: str | None) -> tuple[str, str | None]:
    """Where a tokenizer is, and the dataset whose text to show: a run is its newest checkpoint and its dataset."""
    from pathlib import Path

    from siliconlm.data.vocabulary import is_tokenizer

    if source is None:
        from siliconlm import engine

        return engine.default_data(_request(None, None, "none", None, {})) or engine.BUILTIN, None
    if is_tokenizer(source):
        return source, None
    from siliconlm.data.dataset import datasets
    from siliconlm.errors import nearest
    from siliconlm.training.checkpoint import all_runs, find_run

    known = [*datasets(), *(run.name for run in all_runs())]
    if source not in known and not (Path(source).expanduser() / "run.toml").is_file():
        fix = nearest(source, known) or (f"There are: {', '.join(known[:8])}." if known else "Type: silicon prepare")
        raise SiliconError(f"no dataset, run or file named {source!r}", fix=fix, kind="missing_input")
    run = find_run(source)
    checkpoint, _ = run.newest(["tokenizer.json"])
    return str(checkpoint.path), run.config()[0].data.name


def _request(
    data: str | None, preset: str | None, profile: str, assignments: list[str] | None, flags: Mapping[str, object]
) -> Request:
    from siliconlm.engine import Request

    return Request(data, preset, profile, tuple(assignments or ()), tuple(_layers(flags)))


def _tracked(events: Iterator[Event], where: str | None) -> Iterator[Event]:
    """The events, read by a dashboard's backend too where one is asked for."""
    if where is None:
        return events
    from siliconlm.cli import track

    return track.tracked(events, track.check_backend(where))


def _layers(flags: Mapping[str, object]) -> Iterator[Layer]:
    """One layer for all flags that were given, so that two budgets on one command line contradict each other."""
    from siliconlm.config import Layer

    given = {name: value for name, value in flags.items() if value is not None}
    names = " ".join("--" + name.rsplit(".", 1)[1].replace("_", "-") for name in given)
    if given:
        yield Layer(names, given)


def _seconds(flag: str, text: str) -> float:
    from siliconlm.config import seconds

    try:
        time = seconds(text)
    except ValueError as error:
        raise SiliconError(f"{flag} {text}: {error}") from None
    if not 0 < time < math.inf:
        raise SiliconError(f"{flag} {text}: it must be more than nothing, and finite")
    return time


def _step(text: str | None) -> int | str | None:
    if text is None or text == "best":
        return text
    if not text.isdigit():
        raise SiliconError(f"--step {text} is neither a number nor best")
    return int(text)
