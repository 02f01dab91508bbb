"""The layer graph as a networkx graph: for ancestors, dominators, components, chains and critical paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import networkx
from torch.fx import Node

from rewrite.graph.program import Program

if TYPE_CHECKING:
    View = networkx.DiGraph[Node]


def view(program: Program, cost: Callable[[Node], float] = lambda node: 0.0) -> View:
    """A graph over the nodes of a program, an edge from each value to each node that uses it.

    A node's ``cost`` is the attribute ``cost`` of the node, and ``weight`` of the edges that lead to it. Linear in the
    graph; it is of one state of the program: make a new one after an edit.
    """
    made: View = networkx.DiGraph()
    for node in program.graph.nodes:
        own = cost(node)
        made.add_node(node, cost=own)
        made.add_edges_from(((source, node) for source in node.all_input_nodes), weight=own)
    return made


def critical_path(program: Program, cost: Callable[[Node], float]) -> tuple[list[Node], float]:
    """The chain of nodes, each using the one before, whose costs add up to the most; and that sum."""
    graph = view(program, cost)
    path: list[Node] = networkx.dag_longest_path(graph, weight="weight")
    return path, sum(graph.nodes[node]["cost"] for node in path)
