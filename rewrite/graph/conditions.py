"""Conditions on input sizes that a capture rests on, such as "the length is at most 16"."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_ALLOWED = (
    ast.Expression,
    ast.Compare,
    ast.BoolOp,
    ast.BinOp,
    ast.UnaryOp,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)


@dataclass(frozen=True)
class Condition:
    """``expression`` over names ``s<input>_<axis>`` must hold; ``words`` says it with the arguments' names."""

    expression: str
    words: str

    def check(self) -> Callable[..., bool]:
        """The condition as a function of a mapping from names to sizes.

        Raises ValueError if the expression holds anything but arithmetic and comparisons: it may come from a file.
        """
        tree = ast.parse(self.expression, mode="eval")
        for node in ast.walk(tree):
            if not isinstance(node, _ALLOWED) or (isinstance(node, ast.Constant) and not isinstance(node.value, int)):
                raise ValueError(f"not a condition on sizes: {self.expression}")
        names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
        # a function, not an eval at each call: torch.compile traces through it
        source = ast.parse(f"lambda {', '.join(names)}: 0", mode="eval")
        source.body.body = tree.body  # type: ignore[attr-defined]
        holds = eval(compile(source, "<rewrite.condition>", "eval"), {"__builtins__": {}})
        return lambda sizes: bool(holds(*[sizes[name] for name in names]))


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
        except (ValueError, SyntaxError):
            continue
        found.append(condition)
    return tuple(found)


def broken(checks: Sequence[tuple[Condition, Callable[..., bool]]], inputs: Sequence[Any]) -> str | None:
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
