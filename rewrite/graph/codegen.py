"""Copying ``torch.fx`` graphs and compiling them to Python functions."""

from __future__ import annotations

import contextlib
import itertools
import keyword
import linecache
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch.fx.graph as fx_graph
from torch import nn
from torch.fx import Graph, Node

_serial = itertools.count()
_SHADOWED = frozenset(
    {
        "adopt",
        "assume",
        "bias_name",
        "channel_axis",
        "channels",
        "code",
        "contexts",
        "eps",
        "function",
        "gain",
        "graph",
        "graphs",
        "interface",
        "kind",
        "offset",
        "properties",
        "reason",
        "recompile",
        "runs",
        "shapes",
        "shift",
        "weight_name",
    }
)
"""Attributes of layer graphs and regions that a user's parameter or layer may be named like."""


def fetch(module: nn.Module, name: str) -> Any:
    """The parameter, buffer, child or other attribute called ``name``, in this order: users' names come first."""
    for held in (module._parameters, module._buffers, module._modules):
        if name in held:
            return held[name]
    return getattr(module, name, None)


def copy_graph(graph: Graph) -> Graph:
    """A copy of ``graph`` with the same node names and metadata (metadata values are shared)."""
    made = Graph()
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        values[node] = made.node_copy(node, lambda n: values[n])
    return made


def compile_graph(graph: Graph) -> tuple[Callable[..., Any], str]:
    """``run(self, *flat_inputs) -> flat outputs`` for a graph, with its source known to tracebacks."""
    with name_safe():
        code = graph.python_code("self")
    name = f"<rewrite.graph.{next(_serial)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    names = {**code.globals, "fetch": fetch}
    exec(compile(code.src, name, "exec"), names)
    return names["forward"], code.src


def name_safe() -> contextlib.AbstractContextManager[None]:
    """As ``keyword_safe``, and past our own attributes too; the code needs ``fetch``."""
    return _written({*keyword.kwlist, *_SHADOWED}, lambda base, part: f"fetch({base}, {part!r})")


def keyword_safe() -> contextlib.AbstractContextManager[None]:
    """Let torch.fx generate code for attributes named like Python keywords (``scales["in"]``), which it writes as
    ``self.scales.in``.
    """
    return _written(set(keyword.kwlist), lambda base, part: f"getattr({base}, {part!r})")


@contextlib.contextmanager
def _written(special: Set[str], write: Callable[[str, str], str]) -> Iterator[None]:
    original = fx_graph._format_target

    def format_target(base: str, target: str) -> str:
        for part in target.split("."):
            if part in special:
                base = write(base, part)
            else:  # torch.fx puts any other name between quotes as it is
                base = f"{base}.{part}" if part.isidentifier() else f"getattr({base}, {part!r})"
        return base

    fx_graph._format_target = format_target
    try:
        yield
    finally:
        fx_graph._format_target = original
