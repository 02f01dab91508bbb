"""Conditions on input sizes that a capture rests on, such as "the length is at most 16".

They may come from a file, so they are read by a grammar of their own and never compiled: integers, names of sizes,
``+ - * // %``, comparisons, ``and or not``, and powers with a small exponent.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .expressions import Expression, read_expression

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_BITS, _EXPONENT = 1024, 8

Sizes = Mapping[str, int]
_Value = Callable[[Sizes], int]

_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
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
            holds, _ = _read(read_expression(self.expression))
        except ValueError:
            raise ValueError(f"not a condition on sizes: {self.expression[:80]!r}") from None

        def check(sizes: Sizes) -> bool:
            try:
                return bool(holds(sizes))
            except ZeroDivisionError:
                return False

        return check

    def names(self) -> set[str]:
        """The sizes that it is about."""
        return {str(part.value) for part in read_expression(self.expression).walk() if part.kind == "name"}


def _read(part: Expression) -> tuple[_Value, int]:
    """An expression as a function of the sizes, and how many bits its value has at most."""
    if part.kind == "number" and isinstance(part.value, int):
        return _constant(part.value), _bounded(part.value.bit_length())
    if part.kind == "name":
        return _named(str(part.value)), 64
    if part.kind in _ARITHMETIC:
        return _arithmetic(part)
    if part.kind in _COMPARISONS:
        return _comparison(part), 1
    if part.kind in ("and", "or"):
        return _logic(part), 64
    if part.kind in ("negative", "not"):
        return _unary(part)
    raise ValueError(part.kind)


def _bounded(bits: int) -> int:
    if bits > _BITS:
        raise ValueError("a number of more bits than sizes have")
    return bits


def _constant(value: int) -> _Value:
    return lambda sizes: value


def _named(name: str) -> _Value:
    return lambda sizes: sizes[name]


def _arithmetic(part: Expression) -> tuple[_Value, int]:
    (left, a), (right, b) = (_read(operand) for operand in part.parts)
    apply = _ARITHMETIC[part.kind]
    bits = a + b if part.kind == "*" else max(a, b) + 1
    if part.kind == "**":
        exponent = part.parts[1].value
        if not isinstance(exponent, int) or not 0 <= exponent <= _EXPONENT:
            raise ValueError("an exponent that is no small number")
        bits = a * exponent
    return lambda sizes: apply(left(sizes), right(sizes)), _bounded(bits)


def _comparison(part: Expression) -> _Value:
    (left, _), (right, _) = (_read(operand) for operand in part.parts)
    test = _COMPARISONS[part.kind]
    return lambda sizes: test(left(sizes), right(sizes))


def _logic(part: Expression) -> _Value:
    (left, _), (right, _) = (_read(operand) for operand in part.parts)
    if part.kind == "and":
        return lambda sizes: left(sizes) and right(sizes)
    return lambda sizes: left(sizes) or right(sizes)


def _unary(part: Expression) -> tuple[_Value, int]:
    inner, bits = _read(part.parts[0])
    if part.kind == "not":
        return lambda sizes: not inner(sizes), 1
    return lambda sizes: -inner(sizes), bits


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
