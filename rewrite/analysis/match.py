"""Patterns over the layer graph: a rule is a pattern, a check that gives its reason, and a rewrite.

    x = Var("x")
    pattern = Layer(nn.Linear, Layer(nn.Linear, x, name="first"), name="second")

A match never crosses a mutation: if something writes, between the match's first and last node, into a tensor that it
reads or makes, there is no match.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from rewrite.graph.program import Program

from .writes import Writes


@dataclass(frozen=True)
class Var:
    """Any value; the same name stands for the same value throughout a pattern."""

    name: str


class Call:
    """A call of one of several functions (ATen overloads) on given arguments; a literal argument must be equal."""

    def __init__(self, targets: Any, *args: Any, name: str | None = None) -> None:
        self.targets = frozenset(targets if isinstance(targets, tuple | list | set) else [targets])
        self.args = args
        self.name = name


class Layer:
    """A call of a layer of one of several classes on given arguments."""

    def __init__(self, types: type[nn.Module] | tuple[type[nn.Module], ...], *args: Any, name: str | None = None) -> None:
        self.types = types
        self.args = args
        self.name = name


Pattern = Var | Call | Layer


@dataclass
class Match:
    """Where a pattern was found: its root, the nodes it consists of (root last), and the values of its names."""

    root: Node
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def path_of(node: Node) -> str:
    """Where a node stands: its layer's path, or its own name."""
    return str(node.target) if node.op == "call_module" else node.name


def find(program: Program, pattern: Pattern) -> Iterator[Match]:
    """Every match of a pattern, in execution order. The cost is linear in the graph and in the matches.

    An inner node of a match is used by the match alone; one that others use too does not match.
    """
    writes = Writes(program.graph, program.module)
    for node in program.graph.nodes:
        match = Match(node)
        if matches(pattern, node, match, program, root=True):
            match.nodes.sort(key=writes.position)
            if not writes.between(match.nodes):
                yield match


def matches(pattern: Any, value: Any, match: Match, program: Program, root: bool = False) -> bool:
    """Whether a value has a pattern's form; what its variables stand for is noted in ``match``."""
    if isinstance(pattern, Var):
        return match.values.setdefault(pattern.name, value) is value
    if not isinstance(pattern, Call | Layer):
        return not isinstance(value, Node) and bool(value == pattern)
    if not isinstance(value, Node) or not _is_target(pattern, value, program):
        return False
    if not root and len(value.users) != 1:
        return False
    if len(pattern.args) > len(value.args) or not all(
        matches(p, v, match, program) for p, v in zip(pattern.args, value.args, strict=False)
    ):
        return False
    match.nodes.append(value)
    if pattern.name is not None:
        match.values[pattern.name] = value
    return True


def _is_target(pattern: Call | Layer, node: Node, program: Program) -> bool:
    if isinstance(pattern, Call):
        return node.op == "call_function" and node.target in pattern.targets
    return node.op == "call_module" and isinstance(program.layer(node), pattern.types)
