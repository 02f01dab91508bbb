"""Properties of a program: what holds for the whole of it and is no node of its graph, by name, as plain values.

What a name means is said by a `Property`, which a package announces by an entry point of the group `rewrite.properties`:
above all the context in which each forward runs, as hooks on what autograd saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from rewrite.errors import RewriteError, did_you_mean
from rewrite.plugins import PROPERTIES, announced, load
from rewrite.torch_private import frame_compiler

NONE: Mapping[str, Any] = MappingProxyType({})
_DEPTH, _LEAVES, _TEXT = 16, 100_000, 10_000


Runner = Callable[..., Any]
"""A graph that is run: ``run(module, *inputs)``."""


@dataclass(frozen=True)
class Running:
    """How graphs are run: ``made(graph)`` is what runs one; ``begin(path)`` is told of a part that is run as a whole."""

    made: Callable[[Graph], Runner]
    begin: Callable[[str], None] = lambda path: None


Around = Callable[[nn.Module, Sequence[torch.Tensor], Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Property:
    """What a property does.

    ``around(module, inputs, value)`` is the context in which each forward of the module runs on these tensors; without
    it the value only tells something. It must leave what the forward computes as it is, bit for bit. ``check(value)``
    raises RewriteError for a value that it cannot have. ``inference`` says whether a lowering for inference keeps it.
    ``execute(graph, running, value)`` gives what runs a layer graph, or None where nothing changes. The
    context of a lower ``rank`` is entered first, around those of higher ones.
    """

    around: Around | None = None
    check: Callable[[Any], None] = lambda value: None
    inference: bool = False
    execute: Callable[[Graph, Running, Any], Runner | None] | None = None
    rank: int = 0
    compiled: Around | None = None

    def context(self, is_compiled: bool) -> Around | None:
        """The context of a forward."""
        return self.compiled if is_compiled and self.compiled is not None else self.around


def known(name: str) -> Property:
    """The property that is installed under this name. Raises RewriteError where none is."""
    installed = {each.name: each for each in announced(PROPERTIES)}
    if name not in installed:
        hint = did_you_mean(name, installed) or "; the package that it comes from is not installed"
        raise RewriteError(f"there is no property {name!r} of programs{hint}")
    found = load(installed[name], "property")
    if not isinstance(found, Property):
        raise RewriteError(f"property {name!r} is refused: {found!r} is no rewrite.graph.properties.Property")
    return found


def checked(properties: Mapping[str, Any]) -> Mapping[str, Any]:
    """Properties by name, known and frozen. Raises RewriteError for one that is not known, or cannot have its value."""
    made = {}
    for name, value in properties.items():
        made[name] = frozen(value)
        known(name).check(made[name])
    return MappingProxyType(made)


def frozen(value: Any) -> Any:
    """A plain JSON value that nobody can change: lists as tuples. Raises RewriteError for anything else."""
    leaves = iter(range(_LEAVES))

    def freeze(part: Any, depth: int) -> Any:
        if depth > _DEPTH or next(leaves, None) is None:
            raise RewriteError("the value of a property is nested deeper, or is larger, than any needs to be")
        if isinstance(part, Mapping) and all(isinstance(key, str) and len(key) <= _TEXT for key in part):
            return MappingProxyType({key: freeze(item, depth + 1) for key, item in part.items()})
        if isinstance(part, list | tuple):
            return tuple(freeze(item, depth + 1) for item in part)
        plain = part is None or type(part) in (bool, int) or (type(part) is str and len(part) <= _TEXT)
        if plain or (type(part) is float and math.isfinite(part)):
            return part
        raise RewriteError(f"the value of a property holds {str(part)[:60]!r}, which is no plain JSON value")

    return freeze(value, 0)


def thawed(value: Any) -> Any:
    """A frozen value as JSON takes it."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


def executed(graph: Graph, running: Running, properties: Mapping[str, Any]) -> Runner:
    """What runs a layer graph as its properties say."""
    for name, value in properties.items():
        execute = known(name).execute
        run = None if execute is None else execute(graph, running, value)
        if run is not None:
            return run
    return running.made(graph)


def ranked(properties: Mapping[str, Any]) -> list[str]:
    """The names in the order in which their contexts are entered."""
    return sorted(properties, key=lambda name: known(name).rank)


def under(run: Callable[..., Any], properties: Mapping[str, Any]) -> Callable[..., Any]:
    """``run(module, *inputs)`` in the contexts that properties put around it."""
    entered = [(found, properties[name]) for name in ranked(properties) if (found := known(name)).around is not None]
    if not entered:
        return run

    def applied(module: nn.Module, *inputs: Any) -> Any:
        is_compiled = frame_compiler() is not None
        with ExitStack() as stack:
            _enter(stack, module, [v for v in inputs if isinstance(v, torch.Tensor)], entered, is_compiled)
            return run(module, *inputs)

    return uncompiled(applied)


def uncompiled(function: Callable[..., Any], *, within: bool = False) -> Callable[..., Any]:
    """The function as torch.compile leaves it: called as it is, while what it calls is compiled, unless ``within``."""
    found: Callable[..., Any] = torch.compiler.disable(function, recursive=within)
    return found


def _entered(
    stack: ExitStack,
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    entered: Sequence[tuple[Property, Any]],
    is_compiled: bool,
) -> None:
    for each, value in entered:
        around = each.context(is_compiled)
        if around is not None:
            stack.enter_context(around(module, inputs, value))


_enter = uncompiled(_entered, within=True)
