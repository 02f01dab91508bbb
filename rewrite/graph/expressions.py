"""Arithmetic as text, read by a grammar of its own: what may come from a file is never compiled, not even to look at it.

Numbers, names, quoted words, calls with arguments and flags, ``+ - * / // % **``, comparisons, ``not and or``, parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LENGTH, HEIGHT = 20_000, 100
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
_LEVELS = {"or": 1, "and": 2, **dict.fromkeys(COMPARISONS, 4), "+": 5, "-": 5, "*": 6, "/": 6, "//": 6, "%": 6, "**": 8}
_NOT, _COMPARED, _SIGNED = 3, 4, 7
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|"
    r"(?P<text>'[^'\\\n]*'|\"[^\"\\\n]*\")|(?P<sign>\*\*|//|[<>=!]=|[-+*/%<>(),=]))",
    re.ASCII,
)


@dataclass(frozen=True)
class Expression:
    """A part of an expression. ``kind`` is number, name, text, call, negative, not, or the sign of an operator."""

    kind: str
    value: int | float | str = ""
    parts: tuple[Expression, ...] = ()
    flags: tuple[tuple[str, Expression], ...] = ()
    height: int = 1

    def walk(self) -> Iterator[Expression]:
        """The part itself and all below it; flags of calls are not followed."""
        yield self
        for part in self.parts:
            yield from part.walk()


def read_expression(text: str) -> Expression:
    """The expression that a text is. Raises ValueError for any other, and for one that is long or nested without reason."""
    if len(text) > LENGTH or not text.isascii():
        raise ValueError("too long, or with letters that no size has")
    parser = _Parser(_tokens(text))
    found = parser.binary(0)
    if parser.word():
        raise ValueError("more than an expression")
    return found


def _tokens(text: str) -> list[tuple[str, str]]:
    found, place, end = [], 0, len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            raise ValueError("a character that is no part of an expression")
        found.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._place = 0
        self._depth = 0

    def word(self) -> str:
        """The next token, if it is a sign or a word; a mark that is neither for numbers and texts; empty at the end."""
        if self._place >= len(self._tokens):
            return ""
        kind, text = self._tokens[self._place]
        return text if kind in ("name", "sign") else "0"

    def binary(self, least: int) -> Expression:
        """Operators that bind as strongly as ``least`` or more."""
        self._depth += 1
        if self._depth > HEIGHT:
            raise ValueError("nested without reason")
        left = self._single()
        while _LEVELS.get(self.word(), -1) >= max(least, 1):
            sign = self._next()[1]
            level = _LEVELS[sign]
            if sign in COMPARISONS:
                left = self._compared(left, sign)
            else:
                left = _made(sign, left, self.binary(level if sign == "**" else level + 1))
        self._depth -= 1
        return left

    def _compared(self, left: Expression, sign: str) -> Expression:
        """``a < b <= c`` is ``a < b and b <= c``."""
        right = self.binary(_COMPARED + 1)
        found = _made(sign, left, right)
        while self.word() in COMPARISONS:
            sign = self._next()[1]
            left, right = right, self.binary(_COMPARED + 1)
            found = _made("and", found, _made(sign, left, right))
        return found

    def _next(self) -> tuple[str, str]:
        if self._place >= len(self._tokens):
            raise ValueError("no whole expression")
        self._place += 1
        return self._tokens[self._place - 1]

    def _single(self) -> Expression:
        kind, text = self._next()
        if kind == "number":
            return Expression("number", int(text) if text.isdecimal() else float(text))
        if kind == "text":
            return Expression("text", text[1:-1])
        if text in ("-", "+"):
            operand = self.binary(_SIGNED)
            return operand if text == "+" else _made("negative", operand)
        if text == "not":
            return _made("not", self.binary(_NOT))
        if text == "(":
            inner = self.binary(0)
            self._expect(")")
            return inner
        if kind != "name" or text in _LEVELS:
            raise ValueError("no whole expression")
        if self.word() == "(":
            return self._call(text)
        return Expression("name", text)

    def _call(self, name: str) -> Expression:
        self._expect("(")
        parts: list[Expression] = []
        flags: list[tuple[str, Expression]] = []
        while self.word() != ")":
            given = self.binary(0)
            if given.kind == "name" and self.word() == "=":
                self._expect("=")
                flags.append((str(given.value), self.binary(0)))
            else:
                parts.append(given)
            if self.word() != ")":
                self._expect(",")
        self._expect(")")
        made = _made("call", *parts)
        return Expression("call", name, made.parts, tuple(flags), made.height)

    def _expect(self, sign: str) -> None:
        if self._next() != ("sign", sign):
            raise ValueError("no whole expression")


def _made(kind: str, *parts: Expression) -> Expression:
    height = 1 + max((part.height for part in parts), default=0)
    if height > HEIGHT:
        raise ValueError("longer than any expression over sizes")
    return Expression(kind, parts=parts, height=height)
