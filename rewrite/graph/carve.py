"""Cutting nodes out of a graph into a subgraph that one call replaces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node


def carve(
    nodes: Sequence[Node],
    outputs: Sequence[Any],
    inputs: Mapping[Node, Node] | Sequence[Node],
    rename: Callable[[Node], Node] = lambda n: n,
) -> Graph:
    """A graph of its own from ``nodes`` (in order); ``inputs`` become its placeholders, ``outputs`` its results.

    ``rename`` maps a node that is used from outside to the input that stands for it.
    """
    made = Graph()
    values: dict[Node, Node] = {}
    for source in inputs:
        placeholder = made.placeholder(source.name)
        placeholder.meta = dict(source.meta)
        values[source] = placeholder

    def value(node: Node) -> Node:
        return values[node] if node in values else values[rename(node)]

    for node in nodes:
        values[node] = made.node_copy(node, value)
    results = torch.fx.map_arg(tuple(outputs), value)
    made.output(results[0] if len(results) == 1 else results)
    return made


def free_inputs(nodes: Sequence[Node], outputs: Sequence[Any] = ()) -> list[Node]:
    """The nodes outside of ``nodes`` that they (or ``outputs``) use, in order of first use."""
    inside = set(nodes)
    found: dict[Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside:
                found[source] = None
    for output in outputs:
        if isinstance(output, Node) and output not in inside:
            found[output] = None
    return list(found)


def used_outside(nodes: Sequence[Node]) -> list[Node]:
    """The nodes whose value is used by a node outside of ``nodes``, in order."""
    inside = set(nodes)
    return [n for n in nodes if any(user not in inside for user in n.users)]


def replace_with_call(
    graph: Graph, path: str, inputs: Sequence[Node], outputs: Sequence[Node | None], before: Node, meta: Mapping[str, Any]
) -> list[Node]:
    """Insert ``call_module path(*inputs)`` before a node; the nodes that stand for each output."""
    with graph.inserting_before(before):
        call = graph.call_module(path, tuple(inputs))
        call.meta.update(meta)
        if len(outputs) == 1:
            call.meta["val"] = outputs[0].meta.get("val") if outputs[0] is not None else None
            return [call]
        call.meta["val"] = tuple(o.meta.get("val") if o is not None else None for o in outputs)
        made = []
        for i, output in enumerate(outputs):
            item = graph.call_function(operator.getitem, (call, i))
            item.meta.update(meta)
            item.meta["val"] = output.meta.get("val") if output is not None else None
            made.append(item)
        return made
