"""The grammar of size expressions in an export. torch evaluates their text, so they are judged before it sees them.

They are written as sympy prints them: ``Mul(Integer(2), Symbol('s77', positive=True, integer=True))``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from rewrite.errors import RewriteError

from .checked import LARGEST, shown, symbol

_LENGTH, _NODES, _EXPONENT = 20_000, 1000, 8
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
    if not isinstance(text, str) or len(text) > _LENGTH or not text.isascii():
        raise RewriteError(f"it holds the size expression {shown(text)}, which is none")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = list(_parts(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refused(text) from None
    if len(nodes) > _NODES or not all(_is_legal(node) for node in nodes) or _nested_power(tree):
        raise _refused(text)


def _refused(text: str) -> RewriteError:
    return RewriteError(f"it holds the size expression {shown(text)}, which does more than calculate with sizes")


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """Every part of an expression but the texts and flags inside of ``Symbol`` and ``Float``, which are judged with it."""
    yield node
    if isinstance(node, ast.Call):
        children: list[ast.expr] = (
            [] if _name(node) in ("Symbol", "Float") else [*node.args, *(k.value for k in node.keywords)]
        )
    else:
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    for child in children:
        yield from _parts(child)


def _name(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _is_legal(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool | float) or (type(node.value) is int and abs(node.value) <= LARGEST)
    if isinstance(node, ast.Name):
        return node.id in _NAMES or _is_symbol(node.id)
    if isinstance(node, ast.Call):
        return _is_legal_call(node)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub | ast.UAdd)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.FloorDiv | ast.Mod | ast.Pow)
    return isinstance(node, ast.Tuple)


def _is_legal_call(node: ast.Call) -> bool:
    name = _name(node)
    flags = all(k.arg in _ASSUMPTIONS and _is_flag(k.value) for k in node.keywords)
    if name == "Symbol":
        given = node.args[0] if len(node.args) == 1 else None
        return flags and isinstance(given, ast.Constant) and isinstance(given.value, str) and _is_symbol(given.value)
    if name == "Float":
        given = node.args[0] if len(node.args) == 1 else None
        return flags and isinstance(given, ast.Constant) and _is_number(given.value)
    return flags and name in _FUNCTIONS


def _is_flag(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (
        isinstance(node.value, bool) or (type(node.value) is int and 0 <= node.value < 999)
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) < 60 and set(value) <= set("0123456789.+-e")
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _is_symbol(value: str) -> bool:
    try:
        return bool(symbol(value)) and value[-1].isdigit()
    except RewriteError:
        return False


def _nested_power(tree: ast.AST, inside: bool = False) -> bool:
    """Whether a power stands in another, or has an exponent that is no small number."""
    power = isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Pow)
    parts: list[ast.expr] = []
    if isinstance(tree, ast.BinOp) and power:
        parts = [tree.left, tree.right]
    elif isinstance(tree, ast.Call) and _name(tree) in _POWERS:
        power, parts = True, tree.args
    if power and (inside or len(parts) != 2 or not _is_small(parts[1])):
        return True
    return any(_nested_power(child, inside or power) for child in ast.iter_child_nodes(tree))


def _is_small(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and _name(node) in ("Integer", "Rational", "Float"):
        return all(_is_small(argument) for argument in node.args)
    if isinstance(node, ast.UnaryOp):
        return _is_small(node.operand)
    value = node.value if isinstance(node, ast.Constant) else None
    return (isinstance(value, int | float) and abs(value) <= _EXPONENT) or value in ("0.5", "-0.5")
