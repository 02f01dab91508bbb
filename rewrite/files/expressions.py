"""The grammar of size expressions in an export. torch evaluates their text, so they are judged before it sees them.

They are written as sympy prints them: ``Mul(Integer(2), Symbol('s77', positive=True, integer=True))``.
"""

from __future__ import annotations

from typing import Any

from rewrite.errors import RewriteError
from rewrite.graph.expressions import Expression, read_expression

from .checked import LARGEST, shown, symbol

_PARTS, _EXPONENT = 1000, 8
_POWERS = ("Pow", "PowByNatural", "FloatPow")
_FUNCTIONS = frozenset(
    (
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv"),
        *("CeilDiv", "ModularIndexing", "Where", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt", "TruncToFloat"),
        *("RoundToInt", "CeilToInt", "FloorToInt", "Identity", "IsNonOverlappingAndDenseIndicator", "floor", "ceiling"),
        *("Eq", "Equality", "Ne", "Unequality", "Lt", "Le", "Gt", "Ge", "StrictLessThan", "LessThan", "StrictGreaterThan"),
        *("GreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair", *_POWERS),
    )
)
_NAMES = frozenset({"true", "false", "oo", "int_oo"})
_ASSUMPTIONS = frozenset(
    {"positive", "integer", "nonnegative", "negative", "real", "zero", "finite", "precision", "evaluate"}
)


def check_expression(text: Any) -> None:
    """Refuse a text unless it is an expression over sizes: numbers, symbols, the functions that torch writes.

    Numbers have 64 bits, exponents are at most 8 and do not nest, and there are at most 1,000 parts.
    """
    try:
        tree = read_expression(text) if isinstance(text, str) else None
    except ValueError:
        tree = None
    parts = list(tree.walk()) if tree is not None else []
    if tree is None or len(parts) > _PARTS or not all(_is_legal(part) for part in parts) or _is_nested_power(tree):
        raise _refused(text)


def _refused(text: Any) -> RewriteError:
    return RewriteError(f"it holds the size expression {shown(text)}, which does more than calculate with sizes")


def _is_legal(part: Expression) -> bool:
    if part.kind == "number":
        return abs(float(part.value)) <= LARGEST
    if part.kind == "name":
        return part.value in _NAMES or _is_symbol(part.value)
    if part.kind == "call":
        return _is_legal_call(part)
    if part.kind == "text":
        return _is_symbol(part.value) or _is_number(part.value)  # of Symbol and Float, which are the calls that take one
    return part.kind in ("negative", "+", "-", "*", "/", "//", "%", "**")


def _is_legal_call(part: Expression) -> bool:
    flags = all(name in _ASSUMPTIONS and _is_flag(value) for name, value in part.flags)
    given = part.parts[0] if len(part.parts) == 1 else None
    if part.value == "Symbol":
        return flags and given is not None and given.kind == "text" and _is_symbol(given.value)
    if part.value == "Float":
        return flags and given is not None and given.kind in ("text", "number", "negative")
    return flags and part.value in _FUNCTIONS and not any(inner.kind == "text" for inner in part.parts)


def _is_flag(part: Expression) -> bool:
    number = part.kind == "number" and isinstance(part.value, int) and part.value < 1000
    return number or (part.kind == "name" and part.value in ("True", "False"))


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 60 and set(value) <= set("0123456789.+-e")


def _is_symbol(value: Any) -> bool:
    try:
        return symbol(value)[-1].isdigit()
    except RewriteError:
        return False


def _is_nested_power(part: Expression, inside: bool = False) -> bool:
    """Whether a power stands in another, or has an exponent that is no small number."""
    power = part.kind == "**" or (part.kind == "call" and part.value in _POWERS)
    if power and (inside or len(part.parts) != 2 or not _is_small(part.parts[1])):
        return True
    return any(_is_nested_power(inner, inside or power) for inner in part.parts)


def _is_small(part: Expression) -> bool:
    if (part.kind == "call" and part.value in ("Integer", "Rational", "Float")) or part.kind == "negative":
        return all(_is_small(inner) for inner in part.parts)
    if part.kind == "number":
        return abs(float(part.value)) <= _EXPONENT
    return part.kind == "text" and part.value in ("0.5", "-0.5")
