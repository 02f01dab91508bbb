"""Conditions on input sizes that a capture rests on, such as "the length is at most 16".

They may come from a file, so they are read by a grammar of their own and never compiled: integers, names of sizes,
``+ - * // %``, comparisons, ``and or not``, and powers with a small exponent.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_LENGTH, _BITS, _EXPONENT = 4096, 1024, 8

Sizes = Mapping[str, int]
_Value = Callable[[Sizes], int]

_ARITHMETIC: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARISONS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """``expression`` over names ``s<input>_<axis>`` must hold; ``words`` says it with the arguments' names."""

    expression: str
    words: str

    def check(self) -> Callable[[Sizes], bool]:
        """The condition as a function of a mapping from names to sizes: closures, which torch.compile traces through.

        Raises ValueError if the expression holds anything but arithmetic and comparisons of bounded numbers.
        """
        try:
            holds, _ = _read(_parsed(self.expression))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(f"not a condition on sizes: {self.expression[:80]}") from None

        def check(sizes: Sizes) -> bool:
            try:
                return bool(holds(sizes))
            except ZeroDivisionError:
                return False

        return check

    def names(self) -> set[str]:
        """The sizes that it is about."""
        return {node.id for node in ast.walk(_parsed(self.expression)) if isinstance(node, ast.Name)}


def _parsed(text: str) -> ast.expr:
    if len(text) > _LENGTH or not text.isascii():
        raise ValueError(text)
    return ast.parse(text.strip(), mode="eval").body


def _read(node: ast.expr) -> tuple[_Value, int]:
    """An expression as a function of the sizes, and how many bits its value has at most."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _constant(node.value), _bounded(node.value.bit_length())
    if isinstance(node, ast.Name):
        return _named(node.id), 64
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _arithmetic(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd | ast.Not):
        return _unary(node)
    if isinstance(node, ast.BoolOp):
        return _logic(node), 64
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
        return _comparison(node), 1
    raise ValueError(type(node).__name__)


def _bounded(bits: int) -> int:
    if bits > _BITS:
        raise ValueError("a number of more bits than sizes have")
    return bits


def _constant(value: int) -> _Value:
    return lambda sizes: value


def _named(name: str) -> _Value:
    return lambda sizes: sizes[name]


def _arithmetic(node: ast.BinOp) -> tuple[_Value, int]:
    (left, a), (right, b) = _read(node.left), _read(node.right)
    apply = _ARITHMETIC[type(node.op)]
    bits = a + b if isinstance(node.op, ast.Mult) else max(a, b) + 1
    if isinstance(node.op, ast.Pow):
        exponent = node.right.value if isinstance(node.right, ast.Constant) else None
        if type(exponent) is not int or not 0 <= exponent <= _EXPONENT:
            raise ValueError("an exponent that is no small number")
        bits = a * exponent
    return lambda sizes: apply(left(sizes), right(sizes)), _bounded(bits)


def _unary(node: ast.UnaryOp) -> tuple[_Value, int]:
    inner, bits = _read(node.operand)
    if isinstance(node.op, ast.Not):
        return lambda sizes: not inner(sizes), 1
    if isinstance(node.op, ast.USub):
        return lambda sizes: -inner(sizes), bits
    return inner, bits


def _logic(node: ast.BoolOp) -> _Value:
    parts = [_read(value)[0] for value in node.values]
    decides = isinstance(node.op, ast.Or)

    def holds(sizes: Sizes) -> int:
        for part in parts:  # in order, as Python does: a later part may rest on an earlier one
            if bool(part(sizes)) is decides:
                return decides
        return not decides

    return holds


def _comparison(node: ast.Compare) -> _Value:
    values = [_read(value)[0] for value in (node.left, *node.comparators)]
    tests = [_COMPARISONS[type(op)] for op in node.ops]

    def holds(sizes: Sizes) -> int:
        found = [value(sizes) for value in values]
        return all(test(found[i], found[i + 1]) for i, test in enumerate(tests))

    return holds


def conditions(guards: Sequence[str], places: Mapping[str, int]) -> tuple[Condition, ...]:
    """The guards of an export as conditions; ``places`` gives the graph input that a plain tensor argument is.

    A guard on anything else (a nested input) is left out.
    """
    found = []
    for guard in guards:
        names = {name for name, _ in _SIZE.findall(guard)}
        if not names or not names <= places.keys():
            continue
        expression = _SIZE.sub(lambda m: f"s{places[m[1]]}_{m[2]}", guard)
        condition = Condition(expression, _SIZE.sub(lambda m: f"{m[1]}.size({m[2]})", guard))
        try:
            condition.check()
        except ValueError:
            continue
        found.append(condition)
    return tuple(found)


def broken(checks: Sequence[tuple[Condition, Callable[[Sizes], bool]]], inputs: Sequence[Any]) -> str | None:
    """The words of the first condition that the inputs' sizes break, or None."""
    if not checks:
        return None
    sizes = {
        f"s{i}_{axis}": size
        for i, value in enumerate(inputs)
        if hasattr(value, "shape")
        for axis, size in enumerate(value.shape)
    }
    return next((c.words for c, check in checks if not check(sizes)), None)
