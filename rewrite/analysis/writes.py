"""Which values share memory, and which of them a graph writes in place."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection, Sequence

from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.fakes import same_shape
from rewrite.graph.layers import ModalOperator, TransposedLinear
from rewrite.graph.nodes import attribute, mutated_arguments, overload
from rewrite.graph.regions import Region
from rewrite.torch_private import OpOverload

_FRESH: tuple[type[nn.Module], ...] = (
    nn.Linear,
    TransposedLinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)
"""Layers whose output is always a tensor of its own."""


class Writes:
    """Where tensors are written in place, by groups of values that may share memory."""

    def __init__(self, graph: Graph, module: nn.Module, fresh: Collection[nn.Module] = ()) -> None:
        """``fresh`` layers are held to give tensors of their own."""
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.group: dict[Node, Node] = {}
        self.writes: dict[Node, list[int]] = {}
        for node in graph.nodes:
            self._share(node, _aliased(module, node, fresh))
            for written in _written(module, node):
                self.writes.setdefault(self._root(written), []).append(self.order[node])
        self.writes = self._merged()

    def position(self, node: Node) -> int:
        """The place of a node in execution order."""
        return self.order[node]

    def between(self, nodes: Sequence[Node]) -> bool:
        """Whether something other than ``nodes`` writes, within their span, into a value that they read or make."""
        own = {self.order[n] for n in nodes}
        first, last = self.order[nodes[0]], self.order[nodes[-1]]
        values = {self._root(v) for n in nodes for v in [n, *n.all_input_nodes]}
        for value in values:
            places = self.writes.get(value, [])
            start = bisect.bisect_left(places, first)
            if any(p not in own for p in places[start : bisect.bisect_right(places, last)]):
                return True
        return False

    def into(self, node: Node) -> bool:
        """Whether anything writes into a value."""
        return self._root(node) in self.writes

    def sharers(self, node: Node) -> list[Node]:
        """The other values that may share memory with a value, in execution order."""
        root = self._root(node)
        return [other for other in self.order if other is not node and self._root(other) is root]

    def settled(self, node: Node) -> bool:
        """Whether nothing writes into a value after it is made: whoever reads it reads the same."""
        places = self.writes.get(self._root(node), [])
        return not places or places[-1] <= self.order[node]

    def _root(self, node: Node) -> Node:
        while self.group.get(node, node) is not node:
            node = self.group[node]
        return node

    def _share(self, node: Node, others: list[Node]) -> None:
        for other in others:
            a, b = self._root(node), self._root(other)
            if a is not b:
                self.group[a] = b

    def _merged(self) -> dict[Node, list[int]]:
        merged: dict[Node, list[int]] = {}
        for node, places in self.writes.items():
            merged.setdefault(self._root(node), []).extend(places)
        return {node: sorted(places) for node, places in merged.items()}


def _aliased(module: nn.Module, node: Node, fresh: Collection[nn.Module]) -> list[Node]:
    """The inputs whose memory a node's value may share."""
    found = overload(node)
    if found is not None:
        values = (node.args[place] if place < len(node.args) else node.kwargs.get(name) for place, name in _aliasing(found))
        return [value for value in values if isinstance(value, Node)]
    if node.op == "call_module" and not isinstance(layer := attribute(module, str(node.target)), Region):
        return (
            [] if isinstance(layer, _FRESH) or layer in fresh else [n for n in node.all_input_nodes if same_shape(n, node)]
        )
    return list(node.all_input_nodes) if node.op in ("call_function", "call_module") else []


@functools.cache
def _aliasing(operator: OpOverload) -> tuple[tuple[int, str], ...]:
    """The arguments whose memory an operator's value may share: a schema is slow to ask, and never changes."""
    return tuple((i, a.name) for i, a in enumerate(operator._schema.arguments) if a.alias_info is not None)


def _written(module: nn.Module, node: Node) -> list[Node]:
    if node.op != "call_module":
        return list(mutated_arguments(node))
    layer = attribute(module, str(node.target))
    if isinstance(layer, Region):
        places = {i for graph in layer.graphs.values() for i in _written_inputs(graph, layer)}
        return [n for i, n in enumerate(node.args) if i in places and isinstance(n, Node)]
    mutable = isinstance(layer, ModalOperator) and layer.overload._schema.is_mutable
    return list(node.all_input_nodes) if mutable or getattr(layer, "inplace", False) else []


def _written_inputs(graph: Graph, module: nn.Module) -> list[int]:
    if not any(_written(module, node) for node in graph.nodes):
        return []
    writes = Writes(graph, module)
    return [i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder") if writes.into(n)]
