"""The command that makes a damaged dataset again, out of its data card."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from siliconlm.data.tokenizer import KINDS
from siliconlm.files import sha256


def remake_command(folder: Path) -> str:
    """What to type so that the same dataset comes out; with dots for the rest where the card cannot be read."""
    name = folder.resolve().name if folder.name == "" else folder.name
    try:
        words = _words(json.loads((folder / "dataset.json").read_bytes()), name, folder)
        command = shlex.join(words)
    except (
        OSError,
        ValueError,
        RecursionError,
        LookupError,
        TypeError,
        ArithmeticError,
    ):  # the card may be damaged as well
        command = ""
    if command.isprintable() and command:  # an error stays one line whatever stands in the card
        return command
    return f"silicon prepare ... --name {shlex.quote(name)} --force"


def _words(card: dict[str, Any], name: str, folder: Path) -> list[str]:
    recipe = card["recipe"]
    words = ["silicon", "prepare", *(source["given"] for source in card["sources"]), "--name", name]
    if recipe["field"]:
        words += ["--field", str(recipe["field"])]
    if "foreign" not in card or card["tokenizer"]["kind"] not in KINDS:
        words += ["--tokenizer", _tokenizer(card["tokenizer"], folder)]
    if card["tokenizer"]["kind"] == "bpe":
        words += ["--vocab-size", str(int(recipe["vocab_size"]))]
    if "foreign" not in card and float(recipe["val_fraction"]) != 0.1:
        words += ["--val-fraction", str(float(recipe["val_fraction"]))]
    return [*words, "--force"]


def _tokenizer(entry: dict[str, Any], folder: Path) -> str:
    """The kind; for a given file the dataset's copy, as the card has not kept the path, while the copy is whole."""
    copy = folder / "tokenizer.json"
    if entry["kind"] not in KINDS and copy.is_file() and sha256(copy) == entry["sha256"]:
        return str(copy)
    return str(entry["kind"])
