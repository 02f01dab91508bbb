r"""Pipelines as text: `name{key=value key=value},name{...}`.

A value that is empty or holds a space, comma, brace, quote or `=` stands in single quotes; `''` is a quote:

    drop-dead,dyt{alpha=0.8 where='re:blocks\.\d{1,2}'}

The printer quotes only where needed, and `parse(print_pipeline(p)) == p` for any text in any value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rewrite.errors import PipelineError, RewriteError

_NAME = re.compile(r"\w[\w.-]*")
_BARE = re.compile(r"[^\s,{}'=]+")
_QUOTED = re.compile(r"'((?:[^']|'')*)'")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Element:
    """One pass as written: its name, its options in order, and where both stand in the text they came from.

    Raises `RewriteError` for a name that pipeline text cannot hold, or an option given twice.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()
    position: int = field(default=0, compare=False)
    option_positions: tuple[int, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        keys = [key for key, _ in self.options]
        for name in (self.name, *keys):
            if not _NAME.fullmatch(name):
                raise RewriteError(f"{name!r} is no name: use letters, digits, '_', '-' and '.'")
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RewriteError(f"option '{twice}' of '{self.name}' is given twice")

    def position_of(self, option: str) -> int:
        """Where the option's name stands in the text; the element's own place where that is not known."""
        placed = zip(self.options, self.option_positions, strict=False)
        return next((position for (key, _), position in placed if key == option), self.position)


def parse(text: str) -> tuple[Element, ...]:
    """The elements of a pipeline's text; none for a blank text.

    Raises `PipelineError`, which shows the text with a caret, when the text does not follow the grammar.
    """
    return _Reader(text).pipeline()


def print_pipeline(elements: Iterable[Element]) -> str:
    """The one text of these elements, values quoted only where needed."""
    return ",".join(_print_element(element) for element in elements)


def _print_element(element: Element) -> str:
    options = " ".join(f"{key}={_print_value(value)}" for key, value in element.options)
    return f"{element.name}{{{options}}}" if options else element.name


def _print_value(value: str) -> str:
    return value if _BARE.fullmatch(value) else "'" + value.replace("'", "''") + "'"


class _Reader:
    """Reads one text from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def pipeline(self) -> tuple[Element, ...]:
        if not self.text.strip():
            return ()
        elements = [self.element()]
        while self.take(","):
            elements.append(self.element())
        if self.at < len(self.text):
            raise self.error("expected ',' or the end of the pipeline")
        return tuple(elements)

    def element(self) -> Element:
        position, name = self.name("the name of a pass")
        options: dict[str, str] = {}
        positions: list[int] = []
        if self.take("{"):
            while not self.take("}"):
                key_position, key = self.name("an option or '}'")
                if key in options:
                    raise self.error(f"option '{key}' is given twice", key_position)
                if not self.take("="):
                    raise self.error(f"expected '=' after option '{key}'")
                options[key] = self.value(key)
                positions.append(key_position)
        return Element(name, tuple(options.items()), position, tuple(positions))

    def name(self, expected: str) -> tuple[int, str]:
        self.skip_space()
        found = _NAME.match(self.text, self.at)
        if not found:
            raise self.error(f"expected {expected}")
        self.at = found.end()
        return found.start(), found.group()

    def value(self, key: str) -> str:
        self.skip_space()
        quoted = self.peek() == "'"
        found = (_QUOTED if quoted else _BARE).match(self.text, self.at)
        if not found:
            no_value = f"option '{key}' has no value; write '' for an empty one"
            raise self.error("this quote is never closed" if quoted else no_value)
        self.at = found.end()
        if self.peek() not in ("", "}") and not self.peek().isspace():
            raise self.error("a value with a space, comma, brace, quote or '=' stands in single quotes")
        return found.group(1).replace("''", "'") if quoted else found.group()

    def take(self, mark: str) -> bool:
        self.skip_space()
        taken = self.peek() == mark
        self.at += taken
        return taken

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> None:
        if found := _SPACE.match(self.text, self.at):
            self.at = found.end()

    def error(self, message: str, position: int | None = None) -> PipelineError:
        return PipelineError(message, self.text, self.at if position is None else position)
