"""Copying ``torch.fx`` graphs and compiling them to Python functions."""

from __future__ import annotations

import contextlib
import itertools
import keyword
import linecache
from collections.abc import Callable, Iterator
from typing import Any

import torch.fx.graph as fx_graph
from torch.fx import Graph, Node

_serial = itertools.count()


def copy_graph(graph: Graph) -> Graph:
    """A copy of ``graph`` with the same node names and metadata (metadata values are shared)."""
    made = Graph()
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        values[node] = made.node_copy(node, lambda n: values[n])
    return made


def compile_graph(graph: Graph) -> tuple[Callable[..., Any], str]:
    """``run(self, *flat_inputs) -> flat outputs`` for a graph, with its source known to tracebacks."""
    with keyword_safe():
        code = graph.python_code("self")
    name = f"<rewrite.graph.{next(_serial)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    names = dict(code.globals)
    exec(compile(code.src, name, "exec"), names)
    return names["forward"], code.src


@contextlib.contextmanager
def keyword_safe() -> Iterator[None]:
    """Let torch.fx generate code for attributes named like Python keywords (``scales["in"]``), which it writes as
    ``self.scales.in``."""
    original = fx_graph._format_target

    def format_target(base: str, target: str) -> str:
        if not any(keyword.iskeyword(part) for part in target.split(".")):
            return original(base, target)
        for part in target.split("."):
            base = f"getattr({base}, {part!r})" if keyword.iskeyword(part) else original(base, part)
        return base

    fx_graph._format_target = format_target
    try:
        yield
    finally:
        fx_graph._format_target = original
