"""Chat templates are programs from strangers: Jinja in a sandbox that bounds what they use, how long and how much.

jinja2's own sandbox keeps them from Python's insides, but not from endless loops and strings that fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from siliconlm.errors import SiliconError

LARGEST = 1 << 20  # characters of a template
LONGEST = 1 << 26  # characters of what it writes
ROUNDS = 1 << 20  # of all loops of one rendering
FILTERS = (
    "default first int items join last length list lower map reject rejectattr replace safe select selectattr string"
)
FILTERS += " title tojson trim upper capitalize"
METHODS: dict[type, set[str]] = {
    str: {"capitalize", "endswith", "find", "join", "lower", "lstrip", "replace", "rstrip", "split", "startswith"}
    | {"strip", "title", "upper"},
    dict: {"get", "items", "keys", "values"},
    list: {"count", "index"},
}


class _Generation(Extension):
    """`{% generation %}` marks answers in some templates; here it only passes them through."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters = {name: self.filters[name] for name in FILTERS.split()}
        self.filters |= {"replace": _replaced, "_counted": self._counted, "_joined": _joined}
        self.globals = {"raise_exception": _refuse, "namespace": self.globals["namespace"], "range": range}
        self.left = ROUNDS

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.left -= 1
            if self.left < 0:
                raise SecurityError("its loops do not end")
            yield item

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and not all(isinstance(side, int | float) for side in (left, right)):
            raise SecurityError(f"{operator} is for numbers alone")
        if operator == "**" or any(isinstance(side, int) and abs(side) > LONGEST for side in (left, right)):
            raise SecurityError("its numbers are too large")
        return _bounded(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = METHODS.get(type(obj))
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def call(self, context: Any, function: Any, *words: Any, **named: Any) -> Any:
        if getattr(function, "__name__", "") == "replace" and isinstance(getattr(function, "__self__", None), str):
            return _replaced(function.__self__, *words)
        if function is range and max(map(abs, words), default=0) > ROUNDS:
            raise SecurityError("its loops are too long")
        return _bounded(super().call(context, function, *words, **named))


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list) and len(value) > LONGEST:
        raise SecurityError("it writes too much")
    return value


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    if len(text) + text.count(old) * len(new) > LONGEST:
        raise SecurityError("it writes too much")
    return text.replace(old, new, count)


def _joined(parts: list[Any]) -> str:
    return str(_bounded("".join(map(str, parts))))


def _refuse(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[_Sandbox, jinja2.Template]:
    if len(source) > LARGEST:
        raise SecurityError("it is too long")
    sandbox = _Sandbox()
    tree = sandbox.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
    _bound_concatenations(tree)
    code = sandbox.compile(tree)
    return sandbox, jinja2.Template.from_code(sandbox, code, sandbox.make_globals(None))


def _bound_concatenations(tree: nodes.Template) -> None:
    """`a ~ b` is no operator that the sandbox sees: it becomes a filter that it does."""
    for node in [tree, *tree.find_all(nodes.Node)]:
        for name, child in node.iter_fields():
            if isinstance(child, nodes.Concat):
                setattr(node, name, _as_filter(child))
            elif isinstance(child, list):
                setattr(node, name, [_as_filter(item) if isinstance(item, nodes.Concat) else item for item in child])


def _as_filter(node: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(nodes.List(node.nodes, lineno=node.lineno), "_joined", [], [], None, None, lineno=node.lineno)


def render(source: str, name: str, **values: Any) -> str:
    """What a template writes. SiliconError naming it where it is not Jinja, fails, or does what it may not do."""
    try:
        sandbox, template = _compiled(source)
        sandbox.left = ROUNDS
        written, length = [], 0
        for piece in template.generate(**values):
            written.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise SecurityError("it writes too much")
        return "".join(written)
    except jinja2.TemplateSyntaxError as error:
        raise _bad(f"not valid Jinja in line {error.lineno}: {error.message}", name) from None
    except SecurityError as error:
        raise _bad(f"refused: {error}", name) from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise _bad(f"the template failed: {' '.join(str(error).split())[:200]}", name) from None


def _bad(what: str, name: str) -> SiliconError:
    fix = "Choose a --template: chatml, or a file of your own."
    return SiliconError(what, where=name, fix=fix, kind="bad_data")
