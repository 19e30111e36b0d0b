"""Every command that the README and the help texts show is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from siliconlm.cli.app import UsageError, app
from siliconlm.config import parse_assignments, profile_names, read_profile, resolve, sampling, seconds
from siliconlm.errors import SiliconError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SILICON: Any = typer.main.get_command(app)
OPERATORS = {"&&", "||", ";", "|", "&", ">", ">>"}


@cache
def blocks() -> tuple[tuple[str, str], ...]:
    """The fenced blocks of the README: language and content."""
    return tuple(re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))


def shell_lines() -> Iterator[str]:
    """What a reader would type: every line of an sh block, the lines behind a `$` of a console block."""
    for language, content in blocks():
        whole = content.replace("\\\n", " ")
        if language == "sh":
            yield from whole.splitlines()
        elif language == "console":
            yield from re.findall(r"^\$ (.*)$", whole, re.MULTILINE)


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell line, without comments and settings of the environment."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    current: list[str] = []
    for word in [*words, ";"]:
        if word in OPERATORS:
            yield current
            current = []
        elif current or not re.fullmatch(r"[A-Z_]+=.*", word):
            current.append(word)


def typed(program: str) -> list[list[str]]:
    return [words for line in shell_lines() for words in commands(line) if words and words[0] == program]


def examples() -> list[list[str]]:
    """The examples of the help texts."""
    epilogs = [SILICON.epilog, *(command.epilog for command in SILICON.commands.values())]
    lines = [line.split(": ", 1)[1] for line in epilogs]
    return [words for line in lines for words in commands(line) if words]


def check(words: list[str]) -> None:
    """Parses a command line as the tool would, and looks at the names and values in it; runs nothing."""
    assert words[0] == "silicon"
    if words[1:] in (["--help"], ["--version"]):
        return
    with SILICON.make_context("silicon", []) as root:
        name, command, rest = SILICON.resolve_command(root, words[1:])
        if "--help" in rest:
            return
        given = command.make_context(name, rest, parent=root).params
    layers = []
    if given.get("preset"):
        layers.append(read_profile(given["preset"], kind="preset"))
    if given.get("profile") not in (None, False, "auto", "none") and not str(given["profile"]).endswith(".toml"):
        layers.append(read_profile(given["profile"]))
    resolve(*layers, parse_assignments(given.get("assignments") or ()))
    if given.get("time"):
        assert seconds(given["time"]) > 0
    if name == "sample":
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "num_samples")
        sampling(**{setting: given[setting] for setting in names})


@pytest.mark.parametrize("words", typed("silicon"), ids=shlex.join)
def test_a_command_of_the_readme_is_one(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("words", examples(), ids=shlex.join)
def test_an_example_of_a_help_text_is_one(words: list[str]) -> None:
    check(words)


def test_a_wrong_command_would_be_found() -> None:
    """The check itself: each of these differs from a right command by one word."""
    for line in (
        "silicon trian --steps 3",
        "silicon train --stesp 3",
        "silicon train --steps three",
        "silicon train --preset tny",
        "silicon train --profile mine",
        "silicon train --set train.save_evry=5",
        "silicon train --time soon",
        "silicon sample 'To be' --top-p 5",
        "silicon eval one two",
    ):
        with pytest.raises((UsageError, SiliconError, ValueError)):
            check(shlex.split(line))


def test_the_readme_shows_commands_and_nothing_unfinished() -> None:
    assert len(typed("silicon")) >= 5 and any(language == "console" for language, _ in blocks())
    unfinished = re.findall(r"@@\w+@@|\bTODO\b|\bTBD\b", README)
    assert not unfinished


def test_every_command_is_in_the_table() -> None:
    listed = re.findall(r"^\| `silicon ([a-z-]+)", README, re.MULTILINE)
    assert sorted(listed) == sorted(SILICON.commands)


def test_every_preset_is_in_the_table_and_there_is_no_other() -> None:
    table = README.split("## Model sizes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `?(\w+)`? \|", table, re.MULTILINE)
    assert sorted(rows) == sorted(["preset", *profile_names()])


def test_make_targets_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    asked = {words[1] for words in typed("make")}
    assert {"demo", "test"} <= asked <= set(targets)


def test_links_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README) + re.findall(r"`(docs/[\w./-]+)`", README)
    assert not [link for link in links if not (ROOT / link).exists()]
