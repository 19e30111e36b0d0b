"""Options that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs on stdout.")]
Data = Annotated[str | None, typer.Option(metavar="NAME", help="A prepared dataset, by name or folder.")]
Preset = Annotated[
    str | None,
    typer.Option(metavar="P", help="Model size: tiny, small, medium or large. [default: tiny, or a plan's for a time]"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. train.save_every=100. Repeatable."),
]
Device = Annotated[str | None, typer.Option(metavar="D", help="cuda, mps or cpu. [default: the best there is]")]
OnBattery = Annotated[
    str | None,
    typer.Option(metavar="DO", help="Without mains power: continue, or pause (save and wait). [default: continue]"),
]
Seconds = Annotated[str, typer.Option("--limit", metavar="TIME", help="Longest time to measure for.")]
Run = Annotated[str | None, typer.Argument(metavar="RUN", help="A run by name or folder. [default: the latest]")]
Step = Annotated[str | None, typer.Option(metavar="N", help="A checkpoint by its step, or best. [default: the newest]")]
Track = Annotated[str | None, typer.Option(metavar="WHERE", help="Also write curves to tensorboard, wandb or trackio.")]
