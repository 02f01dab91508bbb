"""Patterns over the layer graph: a rule is a pattern, a check that gives its reason, and a rewrite.

    x = Var("x")
    pattern = Layer(nn.Linear, Layer(nn.Linear, x, name="first"), name="second")

A match never crosses a mutation: if something writes, between the match's first and last node, into a tensor that it
reads or makes, there is no match.
"""

from __future__ import annotations

import abc
import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.layers import ModalOperator
from rewrite.graph.nodes import attribute, mutated_arguments, overload
from rewrite.graph.program import Program
from rewrite.graph.regions import Region

if TYPE_CHECKING:
    from rewrite.pipeline.run import Context


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


class Rule(abc.ABC):
    """One rewrite: where ``pattern`` matches and ``check`` has no objection, ``rewrite`` edits."""

    pattern: Pattern

    def check(self, match: Match, program: Program) -> str | None:
        """Why this match must be left alone, or None."""
        return None

    @abc.abstractmethod
    def rewrite(self, match: Match, program: Program, context: Context) -> None:
        """Edit the program at a match, through ``context.edit``."""


def apply_rules(program: Program, context: Context, *rules: Rule) -> int:
    """Apply each rule at each of its matches, once; failed checks are noted as skipped. The number of rewrites."""
    return sum(_apply_rule(program, context, rule) for rule in rules)


def _apply_rule(program: Program, context: Context, rule: Rule) -> int:
    """Rounds of matching: a match whose values an earlier rewrite of the round changed waits for the next one."""
    done = 0
    matches = list(find(program, rule.pattern))
    while matches:
        used: set[Node] = set()
        waiting: set[Node] = set()
        for match in matches:
            if used.intersection(match.nodes):
                continue
            if not _holds(match, rule.pattern, program):
                waiting.add(match.root)
                used.update(match.nodes)
                continue
            reason = rule.check(match, program)
            if reason is not None:
                context.skip(_path(match.root), reason)
                continue
            used.update(match.nodes)
            rule.rewrite(match, program, context)
            done += 1
        matches = [m for m in find(program, rule.pattern) if m.root in waiting] if waiting else []
    return done


def _holds(match: Match, pattern: Pattern, program: Program) -> bool:
    """Whether a match found earlier is still there, with the same values."""
    now = Match(match.root)
    return _matches(pattern, match.root, now, program, root=True) and set(now.nodes) == set(match.nodes) \
        and all(value is match.values[name] for name, value in now.values.items())


def _path(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def find(program: Program, pattern: Pattern) -> Iterator[Match]:
    """Every match of a pattern, in execution order. The cost is linear in the graph and in the matches.

    An inner node of a match is used by the match alone; one that others use too does not match.
    """
    writes = Writes(program.graph, program.module)
    for node in program.graph.nodes:
        match = Match(node)
        if _matches(pattern, node, match, program, root=True):
            match.nodes.sort(key=writes.position)
            if not writes.between(match):
                yield match


def _matches(pattern: Any, value: Any, match: Match, program: Program, root: bool = False) -> bool:
    if isinstance(pattern, Var):
        return match.values.setdefault(pattern.name, value) is value
    if not isinstance(pattern, Call | Layer):
        return not isinstance(value, Node) and bool(value == pattern)
    if not isinstance(value, Node) or not _is_target(pattern, value, program):
        return False
    if not root and len(value.users) != 1:
        return False
    if len(pattern.args) > len(value.args) or not all(
            _matches(p, v, match, program) for p, v in zip(pattern.args, value.args, strict=False)):
        return False
    match.nodes.append(value)
    if pattern.name is not None:
        match.values[pattern.name] = value
    return True


def _is_target(pattern: Call | Layer, node: Node, program: Program) -> bool:
    if isinstance(pattern, Call):
        return node.op == "call_function" and node.target in pattern.targets
    return node.op == "call_module" and isinstance(program.layer(node), pattern.types)


class Writes:
    """Where tensors are written in place, by groups of values that may share memory."""

    def __init__(self, graph: Graph, module: nn.Module) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.group: dict[Node, Node] = {}
        self.writes: dict[Node, list[int]] = {}
        for node in graph.nodes:
            self._share(node, _aliased(module, node))
            for written in _written(module, node):
                self.writes.setdefault(self._root(written), []).append(self.order[node])
        self.writes = self._merged()

    def position(self, node: Node) -> int:
        """The place of a node in execution order."""
        return self.order[node]

    def between(self, match: Match) -> bool:
        """Whether something outside of a match writes, within its span, into a value that it reads or makes."""
        own = {self.order[n] for n in match.nodes}
        first, last = self.order[match.nodes[0]], self.order[match.nodes[-1]]
        values = {self._root(v) for n in match.nodes for v in [n, *n.all_input_nodes]}
        for value in values:
            places = self.writes.get(value, [])
            start = bisect.bisect_left(places, first)
            if any(p not in own for p in places[start:bisect.bisect_right(places, last)]):
                return True
        return False

    def into(self, node: Node) -> bool:
        """Whether anything writes into a value."""
        return self._root(node) in self.writes

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


def _aliased(module: nn.Module, node: Node) -> list[Node]:
    """The inputs whose memory a node's value may share."""
    found = overload(node)
    if found is not None:
        shared = []
        for place, argument in enumerate(found._schema.arguments):
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is not None and isinstance(value, Node):
                shared.append(value)
        return shared
    if node.op == "call_module" and not isinstance(attribute(module, str(node.target)), Region):
        return [n for n in node.all_input_nodes if _same_shape(n, node)]
    return list(node.all_input_nodes) if node.op in ("call_function", "call_module") else []


def _same_shape(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return getattr(x, "shape", None) == getattr(y, "shape", ())


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
    writes = Writes(graph, module)
    return [i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder") if writes.into(n)]


