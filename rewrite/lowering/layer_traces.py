"""What a layer computes, as operators: traced as torch.export traces it, on values that have sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.layers import AutogradFunction
from rewrite.graph.nodes import aten
from rewrite.graph.regions import Region
from rewrite.torch_private import FakeTensor, FakeTensorMode, OpOverload, make_fx, python_dispatcher, pytree

_READS = (aten.detach.default, aten.sym_size.int)
_NUMBERS = ("_operator", "math", "builtins")


class NotComposedError(Exception):
    """A part of the program is more than operators and layers of them: an export has to trace it whole."""


@dataclass(frozen=True)
class Trace:
    """What a layer computes: its tensors, then its arguments, to the leaves of what it gives."""

    graph: Graph
    spec: pytree.TreeSpec

    @property
    def results(self) -> tuple[Any, ...]:
        """The nodes of the leaves."""
        found: Any = self.graph.output_node().args[0]
        return tuple(found)


def mode_of(graph: Graph) -> FakeTensorMode:
    """The one mode that all values of a graph are of: what training never sees is of another, with sizes of its own."""
    values = pytree.tree_leaves([node.meta.get("val") for node in graph.nodes])
    modes = {value.fake_mode for value in values if isinstance(value, FakeTensor)}
    if len(modes) != 1:
        raise NotComposedError
    return modes.pop()


def traced(layer: nn.Module, fakes: tuple[Any, Any, Any], mode: FakeTensorMode) -> Trace:
    """The operators of a layer on fake tensors of these kinds: its own tensors by name, then its arguments."""
    made = traced_call(lambda *given: torch.func.functional_call(layer, *given), fakes, mode, pre_dispatch=True)
    made.graph.eliminate_dead_code(lambda node: node.target not in _READS)
    return made


def traced_call(run: Callable[..., Any], fakes: tuple[Any, ...], mode: FakeTensorMode, **how: Any) -> Trace:
    """The operators of a function on fake tensors of these kinds, as ``make_fx`` traces it."""
    specs: list[pytree.TreeSpec] = []

    def flat(*given: Any) -> list[Any]:
        leaves, spec = pytree.tree_flatten(run(*given))
        specs.append(spec)
        return leaves

    def apart(value: Any) -> Any:  # tensors alike may be one object, and the trace could not tell them apart
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    try:
        with mode, python_dispatcher():
            given = pytree.tree_map(apart, fakes)
            return Trace(make_fx(flat, **how)(*given).graph, specs[0])
    except Exception as error:  # what is run may raise anything: the whole export will tell why
        raise NotComposedError from error


def kinds_of(given: Any) -> Any:
    """What a trace sees of arguments: of each node its value, which has sizes alone."""
    return pytree.tree_map(lambda v: v.meta["val"] if isinstance(v, Node) else v, given)


def placed(trace: Trace, given: Any, known: Any, take: Callable[[Node, dict[Node, Any]], Any]) -> Any:
    """What a trace gives of the nodes that it is ``given`` in a graph, where ``take`` puts each of its operators.

    Raises NotComposedError where it holds more than operators, or gives other values than are ``known``.
    """
    values: dict[Node, Any] = {}
    leaves = iter(pytree.tree_leaves(given))
    for inner in trace.graph.nodes:
        if inner.op == "placeholder":
            values[inner] = next(leaves)
        elif inner.op == "call_function":
            values[inner] = take(inner, values)
        elif inner.op != "output":
            raise NotComposedError  # a tensor that is no parameter, the body of an operator
    results = list(torch.fx.map_arg(trace.results, values.__getitem__))
    for made, value in zip(results, pytree.tree_leaves(known), strict=True):
        check_same(made.meta["val"] if isinstance(made, Node) else made, value)
    return pytree.tree_unflatten(results, trace.spec)


def check_same(made: Any, known: Any) -> None:
    """A value is what the graph knows of it, unless the module was cast or moved since."""
    layouts = [(v.dtype, v.device, v.dim()) if isinstance(v, torch.Tensor) else None for v in (made, known)]
    if layouts[0] != layouts[1]:
        raise NotComposedError


def is_plain(target: Any) -> bool:
    """An operator, or arithmetic on sizes."""
    if isinstance(target, OpOverload):
        return True
    return getattr(target, "__module__", "") in _NUMBERS or getattr(target, "__name__", "").startswith("sym_")


def is_code(part: nn.Module) -> bool:
    """Whether a part of a program runs as code: it cannot be written as operators."""
    return isinstance(part, AutogradFunction) or (isinstance(part, Region) and bool(part.contexts))
