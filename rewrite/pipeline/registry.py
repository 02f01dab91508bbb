"""Finding passes and backends: built-in and third-party ones alike arrive through entry points.

Listing names imports no pass and no backend; getting one imports only that one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rewrite.errors import OptionError, PipelineError, RewriteError
from rewrite.plugins import PASSES, find, installed, load, provider, unknown
from rewrite.proof.contract import Contract

from .declared import declared
from .pass_ import Pass, describe
from .text import Element, parse


def pass_names() -> tuple[str, ...]:
    """The names of all installed passes, sorted.

    Raises `RewriteError` when two packages provide the same name, or nothing is installed.
    """
    return tuple(installed(PASSES))


def get_pass(name: str) -> type[Pass]:
    """The class of the pass with this name: `get_pass("dyt")(alpha=0.8)`.

    Raises `RewriteError` for an unknown name, naming the nearest, and for an entry point that cannot be
    imported or is no pass: not a frozen dataclass under `Pass`, of another name, or with a contract that
    promises nothing.
    """
    entry_point = find(PASSES, "pass", name)
    found = load(entry_point, "pass")
    reason = refusal(name, found)
    if reason:
        raise RewriteError(f"pass '{name}' from {provider(entry_point)} is refused: {reason}")
    pass_class: type[Pass] = found
    return pass_class


def description_of(name: str) -> dict[str, Any]:
    """All that is told of a pass, in words and as JSON: its documentation, its promises, its options.

    Its module is imported only where its source does not tell. Raises `RewriteError` as `get_pass` does.
    """
    found = declared(find(PASSES, "pass", name))
    if found is None or refusal(name, found):
        found = get_pass(name)
    contract = found().contract()
    promises = {"forward": contract.forward.value, "backward": contract.backward.value}
    return {**asdict(describe(found)), "contract": promises}


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes of a pipeline's text, in order.

    Raises `PipelineError`, which shows the text with a caret, for a mistake in it, and `RewriteError` when it
    names no pass at all, or a pass is refused.
    """
    elements = parse(text)
    if not elements:
        raise RewriteError(f"the pipeline {text!r} names no pass; installed: {', '.join(pass_names())}")
    known = pass_names()
    stranger = next((element for element in elements if element.name not in known), None)
    if stranger is not None:
        raise PipelineError(unknown(PASSES, "pass", stranger.name), text, stranger.position)
    classes = {name: get_pass(name) for name in dict.fromkeys(element.name for element in elements)}
    return tuple(_pass_of(element, classes[element.name], text) for element in elements)


def as_passes(spec: str | Pass | Sequence[str | Pass]) -> tuple[Pass, ...]:
    """The passes of a pipeline's text, a pass, or a sequence of both; raises as `parse_pipeline` does."""
    if isinstance(spec, str):
        return parse_pipeline(spec)
    if isinstance(spec, Pass):
        return (spec,)
    if isinstance(spec, type) or not isinstance(spec, Sequence):
        raise RewriteError(f"{spec!r} is no pass: give its text, a Pass with its options, or a list of these")
    return tuple(pass_ for part in spec for pass_ in as_passes(part))


def _pass_of(element: Element, pass_class: type[Pass], text: str) -> Pass:
    try:
        return pass_class.from_options(dict(element.options))
    except OptionError as error:
        raise PipelineError(str(error), text, element.position_of(error.option)) from None


def refusal(name: str, found: object) -> str:
    """Why this object is no pass of this name; empty when it is one."""
    if not (isinstance(found, type) and issubclass(found, Pass)):
        return f"{found!r} is no subclass of rewrite.Pass"
    if getattr(found, "name", None) != name:
        return f"it calls itself {getattr(found, 'name', None)!r}; the entry point must have the same name"
    if "contract" in found.__abstractmethods__:
        return "it has no contract(), so the engine would have nothing to check"
    if inspect.isabstract(found):
        return f"it lacks {', '.join(sorted(found.__abstractmethods__))}()"
    if found.run is Pass.run and found.steps is Pass.steps:
        return "it lacks run()"
    try:
        describe(found)
    except RewriteError as error:
        return str(error)
    if not isinstance(found().contract(), Contract):
        return "its contract() gives no rewrite.Contract, so the engine would have nothing to check"
    return ""
