"""The house's rules that can be read off the source: who imports whom, who knows torch, devices and the terminal."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import siliconlm

PACKAGE = Path(siliconlm.__file__).parent

# A file imports from rooms of a lower number and from its own room. data and hardware stand side by side and know
# nothing of each other; a model is above data because opening one opens its tokenizer; inference is beside training,
# not above it, because a model is used without a trainer; tuning is above both because it times the training step.
FLOORS = [
    {""},  # siliconlm/__init__.py: the version, nothing else
    {"errors"},
    {"files"},
    {"events", "config"},
    {"hardware", "data"},
    {"model"},
    {"training", "inference"},
    {"export", "tuning"},
    {"engine"},
    {"road"},
    {"server"},  # below cli, which starts it
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Only here may `import siliconlm...` stand inside a function: a command that needs no torch must not wait for it, and
# the doctor must answer where torch cannot be imported at all.
LAZY = {"siliconlm.cli.app", "siliconlm.hardware.diagnosis"}
# Only these import torch themselves. The parent of a probe does not: it asks the device, and leaves work to its child.
TORCH_ROOMS = {"model", "training", "inference", "tuning", "export", "engine"}
CHILDREN = {"siliconlm.tuning.child", "siliconlm.tuning.selftest_child"}
TORCH_FILES = {"siliconlm.hardware.device"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    """The modules an import statement names; `from siliconlm import config` names siliconlm.config."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are written in full"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in MODULES else node.module


def imports(module: str, *, of: ast.AST | None = None) -> set[str]:
    """Every module imported anywhere in a file (or in one node of it): at the top, in functions, for types only."""
    return {name for node in ast.walk(of or tree(module)) for name in imported(node)}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "siliconlm"}


def functions(module: str) -> Iterator[ast.AST]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    return (node for node in ast.walk(tree(module)) if isinstance(node, kinds))


def test_every_room_has_its_floor() -> None:
    rooms = {room(module) for module in MODULES}
    assert rooms <= FLOOR.keys()
    assert {"engine", "cli", "training", "hardware", "data", "model"} <= rooms


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_from_below(module: str) -> None:
    wrong = {
        name
        for name in ours(imports(module))
        if room(name) != room(module) and FLOOR[room(name)] >= FLOOR[room(module)]
    }
    assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports inside functions and for types count too, so no order of first imports can ever fail."""
    graph = {module: ours(imports(module)) - {module, "siliconlm"} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_our_modules_are_imported_at_the_top_but_where_torch_must_wait() -> None:
    lazy = {module for module in MODULES if any(ours(imports(module, of=node)) for node in functions(module))}
    assert lazy == LAZY


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_rooms_that_compute_import_torch(module: str) -> None:
    if room(module) in TORCH_ROOMS or module in TORCH_FILES:
        return
    assert not {name for name in imports(module) if name.split(".")[0] == "torch"}


def test_nothing_is_printed_below_the_command_line() -> None:
    """Child processes answer on stdout: that is their protocol."""
    printing = {
        module
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert {module for module in printing if room(module) not in ("cli", "server")} == CHILDREN
    showing = {
        module for module in MODULES if {"rich", "logging", "typer"} & {n.split(".")[0] for n in imports(module)}
    }
    assert {room(module) for module in showing} == {"cli"}


def test_what_answers_at_once_does_not_wait_for_torch() -> None:
    """Importing these takes no torch; `silicon --help` waits for neither pydantic nor rich."""
    code = (
        "import sys, siliconlm.cli.app\n"
        "heavy = {'torch', 'pydantic', 'rich', 'numpy', 'psutil'} & sys.modules.keys()\n"
        "import siliconlm.config, siliconlm.hardware.facts, siliconlm.hardware.diagnosis\n"
        "import siliconlm.cli.render, siliconlm.data.prepare\n"
        "print(sorted(heavy), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[] False\n"
