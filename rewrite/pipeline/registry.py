"""Finding passes and backends: built-in and third-party ones alike arrive through entry points.

Listing names imports no pass and no backend; getting one imports only that one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rewrite.errors import OptionError, PipelineError, RewriteError, did_you_mean

from .pass_ import Pass, describe
from .text import Element, parse

PASSES = "rewrite.passes"
BACKENDS = "rewrite.backends"
INSTALL = "rewrite is not installed and so has no passes: run `pip install -e .` in its folder"


def pass_names() -> tuple[str, ...]:
    """The names of all installed passes, sorted.

    Raises `RewriteError` when two packages provide the same name, or nothing is installed.
    """
    return tuple(_entry_points(PASSES))


def get_pass(name: str) -> type[Pass]:
    """The class of the pass with this name: `get_pass("dyt")(alpha=0.8)`.

    Raises `RewriteError` for an unknown name, naming the nearest, and for an entry point that cannot be
    imported or is no pass: not a frozen dataclass under `Pass`, of another name, or with a contract that
    promises nothing.
    """
    entry_point = _find(PASSES, "pass", name)
    found = _load(entry_point, "pass")
    reason = _refusal(name, found)
    if reason:
        raise RewriteError(f"pass '{name}' from {_provider(entry_point)} is refused: {reason}")
    pass_class: type[Pass] = found
    return pass_class


def backend_names() -> tuple[str, ...]:
    """The names of all installed backends, sorted; raises as `pass_names` does."""
    return tuple(_entry_points(BACKENDS))


def get_backend(name: str) -> Callable[..., Any]:
    """The lowering function of the backend with this name.

    Raises `RewriteError` for an unknown name, naming the nearest, and for an entry point that cannot be
    imported or called.
    """
    entry_point = _find(BACKENDS, "backend", name)
    found = _load(entry_point, "backend")
    if not callable(found):
        raise RewriteError(f"backend '{name}' from {_provider(entry_point)} is refused: it is no function")
    lowering: Callable[..., Any] = found
    return lowering


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes of a pipeline's text, in order.

    Raises `PipelineError`, which shows the text with a caret, for a mistake in it, and `RewriteError` when it
    names no pass at all, or a pass is refused.
    """
    elements = parse(text)
    if not elements:
        raise RewriteError(f"the pipeline {text!r} names no pass; installed: {', '.join(pass_names())}")
    return tuple(_pass_of(element, text) for element in elements)


def as_passes(spec: str | Pass | Sequence[str | Pass]) -> tuple[Pass, ...]:
    """The passes of a pipeline's text, a pass, or a sequence of both; raises as `parse_pipeline` does."""
    if isinstance(spec, str):
        return parse_pipeline(spec)
    if isinstance(spec, Pass):
        return (spec,)
    if isinstance(spec, type) or not isinstance(spec, Sequence):
        raise RewriteError(f"{spec!r} is no pass: give its text, a Pass with its options, or a list of these")
    return tuple(pass_ for part in spec for pass_ in as_passes(part))


def _pass_of(element: Element, text: str) -> Pass:
    if element.name not in pass_names():
        raise PipelineError(_unknown(PASSES, "pass", element.name), text, element.position)
    try:
        return get_pass(element.name).from_options(dict(element.options))
    except OptionError as error:
        raise PipelineError(str(error), text, element.position_of(error.option)) from None


def _entry_points(group: str) -> dict[str, EntryPoint]:
    """The group's entry points by name, sorted."""
    found: dict[str, EntryPoint] = {}
    for entry_point in sorted(entry_points(group=group), key=lambda each: each.name):
        other = found.setdefault(entry_point.name, entry_point)
        if other is not entry_point:
            providers = " and ".join(sorted((_provider(other), _provider(entry_point))))
            raise RewriteError(
                f"'{entry_point.name}' in {group} is provided twice, by {providers}; uninstall one of them"
            )
    if not found:
        raise RewriteError(INSTALL)
    return found


def _find(group: str, kind: str, name: str) -> EntryPoint:
    found = _entry_points(group)
    if name not in found:
        raise RewriteError(_unknown(group, kind, name))
    return found[name]


def _unknown(group: str, kind: str, name: str) -> str:
    known = tuple(_entry_points(group))
    return f"there is no {kind} '{name}'{did_you_mean(name, known)}; installed: {', '.join(known)}"


def _provider(entry_point: EntryPoint) -> str:
    dist = entry_point.dist
    package = f"{dist.name} {dist.version}" if dist else "an unknown package"
    return f"{package} ({entry_point.value})"


def _load(entry_point: EntryPoint, kind: str) -> Any:
    try:
        return entry_point.load()
    except (ImportError, AttributeError) as error:
        raise RewriteError(
            f"{kind} '{entry_point.name}' from {_provider(entry_point)} cannot be imported: {error}"
        ) from error


def _refusal(name: str, found: object) -> str:
    """Why this object is no pass of this name; empty when it is one."""
    if not (isinstance(found, type) and issubclass(found, Pass)):
        return f"{found!r} is no subclass of rewrite.Pass"
    if getattr(found, "name", None) != name:
        return f"it calls itself {getattr(found, 'name', None)!r}; the entry point must have the same name"
    if "contract" in found.__abstractmethods__:
        return "it has no contract(), so the engine would have nothing to check"
    if inspect.isabstract(found):
        return f"it lacks {', '.join(sorted(found.__abstractmethods__))}()"
    try:
        describe(found)
    except RewriteError as error:
        return str(error)
    if getattr(found().contract(), "is_empty", False):
        return "its contract promises nothing, so the engine would have nothing to check"
    return ""
