"""YAML files of the released code, which compute a few numbers, are read without running anything.

They write a list of sizes as Python, under the tag `!!python/object/apply:eval`. Here it is
evaluated by a calculator that knows numbers, sums, differences, products, `int`, `range` and lists;
all else, and every other tag, is refused.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from maskdino.config.loading import read_nested

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_LONGEST = 200  # characters of an expression
_LARGEST = 10**9  # number
_MOST_STEPS = 5000  # numbers, operations and list entries


class _Calculator:
    """Evaluates one expression; ValueError for all that it does not know, or that is too much."""

    def __init__(self) -> None:
        self._steps = 0

    def value(self, node: ast.expr, names: Mapping[str, int | float]) -> Any:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise ValueError("too long to be evaluated")
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return _bounded(number)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.number(operand, names)
            case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATORS:
                numbers = self.number(left, names), self.number(right, names)
                return _bounded(_OPERATORS[type(kind)](*numbers))
            case ast.Call(func=ast.Name(id="int"), args=[argument], keywords=[]):
                return int(self.number(argument, names))
            case ast.List(elts=entries) | ast.Tuple(elts=entries):
                return [self.value(entry, names) for entry in entries]
            case ast.ListComp(
                elt=entry,
                generators=[
                    ast.comprehension(target=ast.Name(id=name), iter=numbers, ifs=[], is_async=0)
                ],
            ):
                return [self.value(entry, {**names, name: n}) for n in self.series(numbers, names)]
        raise ValueError(f"{ast.unparse(node)!r} is not evaluated")

    def number(self, node: ast.expr, names: Mapping[str, int | float]) -> int | float:
        value = self.value(node, names)
        if isinstance(value, list):
            raise ValueError(f"{ast.unparse(node)!r} is a list where a number is wanted")
        return value

    def series(self, node: ast.expr, names: Mapping[str, int | float]) -> range | list:
        match node:
            case ast.Call(func=ast.Name(id="range"), args=[_, *_] as arguments, keywords=[]):
                return range(*(int(self.number(argument, names)) for argument in arguments[:3]))
        value = self.value(node, names)
        return value if isinstance(value, list) else [value]


def _bounded(number: int | float) -> int | float:
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{number} is too large")
    return number


def calculate(expression: str) -> Any:
    """The value of an expression of numbers: a number or lists of numbers.

    Raises:
        ValueError: the expression holds anything but numbers, `+`, `-`, `*`, `int()`, lists and
            `for x in range()`, or is too large.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"{expression[:40]!r}... is too long to be evaluated")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is no expression") from error
    try:
        return _Calculator().value(tree.body, {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expression!r} is refused: {error}") from error


class _Loader(yaml.SafeLoader):
    """A safe loader with the calculator for the one tag."""


def _calculated(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    words = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    try:
        if len(words) != 1 or not isinstance(words[0], str):
            raise ValueError("an expression is wanted here, in a list of its own")
        return calculate(words[0])
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _calculated)


def read_released_yaml(path: Path) -> dict[str, Any]:
    """The nested values of a file, with those of its `_BASE_` files below them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read, is no YAML, or asks for more than numbers; one line with
            file and line.
    """
    return read_nested(str(Path(path).expanduser()), _Loader)
