"""The types an option of a pass may have: how each is read from text, accepted from Python, and shown."""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewrite.errors import RewriteError

from .select import Selector

NONE = "none"


@dataclass(frozen=True)
class OptionType:
    """What the values of one option are.

    `parse` reads text, `accept` takes (and normalizes) a Python value: both raise `ValueError` for what does
    not fit. `show` is the text of a value, and `parse(show(value)) == value`.
    """

    label: str
    parse: Callable[[str], Any]
    accept: Callable[[Any], Any]
    show: Callable[[Any], str] = str
    accepts: str = ""


@dataclass(frozen=True)
class Bounds:
    """Which numbers an option accepts; nan fits none of them."""

    finite: bool = False
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        limits = (("above", self.above), ("at least", self.at_least), ("below", self.below), ("at most", self.at_most))
        words = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
        return ", ".join(["finite"] * self.finite + words)

    def fits(self, value: float) -> bool:
        return (
            (not self.finite or math.isfinite(value))
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


def option_type(annotation: Any) -> OptionType:
    """The option type of bool, int, float, str, Selector, a Literal, an enum, or one of them | None.

    Raises `RewriteError` for any other annotation.
    """
    if isinstance(annotation, type) and annotation in _PLAIN:
        return _PLAIN[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _choice({_enum_text(member): member for member in annotation})
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return _choice({_literal_text(value): value for value in arguments})
    inner = [argument for argument in arguments if argument is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(inner) == 1:
        return _optional(option_type(inner[0]))
    raise RewriteError(
        f"{annotation!r} is no type of an option; use bool, int, float, str, Selector, Literal, an enum, "
        "or one of them | None"
    )


def bounded(kind: OptionType, bounds: Bounds) -> OptionType:
    """The option type whose numbers lie within bounds; raises `RewriteError` for bounds on what is no number."""
    if not str(bounds):
        return kind
    if kind.label.partition(" ")[0] not in ("int", "float"):
        raise RewriteError(f"bounds ({bounds}) are for numbers, not for {kind.label}")

    def within(value: Any) -> Any:
        if value is not None and not bounds.fits(value):
            raise RewriteError(f"{value!r} is not accepted; it must be {bounds}")
        return value

    return replace(
        kind,
        parse=lambda text: within(kind.parse(text)),
        accept=lambda value: within(kind.accept(value)),
        accepts=str(bounds),
    )


def _instance_of(*kinds: type, to: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def accept(value: Any) -> Any:
        # bool is an int to Python, but never meant as a number here
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(value)
        return to(value)

    return accept


def _selector(value: str | Selector) -> Selector:
    return value if isinstance(value, Selector) else Selector(value)


def _parse_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


_PLAIN: dict[type, OptionType] = {
    bool: OptionType("true or false", _parse_bool, _instance_of(bool, to=bool), lambda v: str(v).lower()),
    int: OptionType("int", int, _instance_of(int, to=int)),
    float: OptionType("float", float, _instance_of(int, float, to=float), repr),
    str: OptionType("text", str, _instance_of(str, to=str)),
    Selector: OptionType("selector", Selector, _instance_of(str, Selector, to=_selector)),
}


def _choice(choices: dict[str, Any]) -> OptionType:
    """One of some values, each with its text; a value or its text is accepted from Python."""
    texts = {value: text for text, value in choices.items()}

    def parse(text: str) -> Any:
        if text not in choices:
            raise ValueError(text)
        return choices[text]

    def accept(value: Any) -> Any:
        known = any(value is choice or (type(value) is type(choice) and value == choice) for choice in texts)
        return value if known else parse(value)

    return OptionType("one of " + ", ".join(choices), parse, accept, lambda value: texts[value])


def _enum_text(member: enum.Enum) -> str:
    return member.value if isinstance(member.value, str) else member.name


def _literal_text(value: Any) -> str:
    return option_type(type(value)).show(value)


def _optional(inner: OptionType) -> OptionType:
    def show(value: Any) -> str:
        text = NONE if value is None else inner.show(value)
        if value is not None and text == NONE:
            raise RewriteError(f"the text {NONE!r} stands for no value in an option that may be none")
        return text

    return OptionType(
        f"{inner.label} or {NONE}",
        lambda text: None if text == NONE else inner.parse(text),
        lambda value: None if value is None else inner.accept(value),
        show,
    )
