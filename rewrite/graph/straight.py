"""A captured run of operators on one tensor, as plain values: a layer that can be pickled, saved and compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.errors import RewriteError
from rewrite.torch_private import OpOverload

from .nodes import map_leaves
from .ops import dtype_limit, dtype_of

_OURS: Mapping[str, Callable[..., Any]] = {f.__name__: f for f in (dtype_of, dtype_limit)}
_VALUE = "value"
Step = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]


class Straight(nn.Module):
    """``steps`` one after the other: each the name of an operator, its arguments and its keywords.

    An argument ``("value", i)`` is the input for i = 0, and what step i gave for any other.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps

    @classmethod
    def of(cls, graph: Graph) -> Straight:
        """The run of a graph with one input and one output whose nodes are ATen calls that write nothing.

        Raises RewriteError for any other graph.
        """
        place: dict[Any, int] = {}
        steps: list[Step] = []

        def plain(leaf: Any) -> Any:
            return (_VALUE, place[leaf]) if isinstance(leaf, Node) else leaf

        for node in graph.nodes:
            if node.op == "call_function":
                args = map_leaves(tuple(node.args), plain)
                steps.append((_name(node.target), args, tuple((k, map_leaves(v, plain)) for k, v in node.kwargs.items())))
            elif node.op not in ("placeholder", "output") or (node.op == "placeholder" and place):
                raise RewriteError(
                    f"{node.name} is no operator on the one input: these operators make no layer of their own"
                )
            place[node] = len(steps)
        if graph.output_node().args[0] is not list(graph.nodes)[-2]:
            raise RewriteError("what the operators give is not what the last of them gives")
        return cls(tuple(steps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: list[Any] = [x]
        for name, args, kwargs in self.steps:
            given = [_filled(argument, values) for argument in args]
            values.append(operator_of(name)(*given, **{key: _filled(value, values) for key, value in kwargs}))
        found: torch.Tensor = values[-1]
        return found

    def extra_repr(self) -> str:
        return ", ".join(name for name, _, _ in self.steps)


def _filled(value: Any, values: list[Any]) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and value[0] == _VALUE:
        return values[value[1]]
    return type(value)(_filled(item, values) for item in value) if isinstance(value, tuple | list) else value


def _name(target: Any) -> str:
    name = str(target).removeprefix("aten.") if isinstance(target, OpOverload) else str(getattr(target, "__name__", ""))
    if operator_of(name) is not target:
        raise RewriteError(f"{target} is no operator on a tensor that writes nothing")
    return name


@functools.cache
def operator_of(name: str) -> Callable[..., Any]:
    """The operator of this name: one of ATen's on tensors that writes nothing, or one of the layer graph's own.

    Raises RewriteError for anything else, as a file may name.
    """
    if name in _OURS:
        return _OURS[name]
    operator, _, overload = name.partition(".")
    found: Any = getattr(getattr(torch.ops.aten, operator, None), overload, None) if overload else None
    first = found._schema.arguments[:1] if isinstance(found, OpOverload) else []
    if not first or found._schema.is_mutable or str(first[0].type) != "Tensor":
        raise RewriteError(f"{name[:60]!r} is no operator on a tensor that writes nothing")
    calling: Callable[..., Any] = found
    return calling
