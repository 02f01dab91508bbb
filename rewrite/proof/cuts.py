"""Cutting out of two graphs what a test needs: the old and the new form of one part, between values claimed to be equal.

From each test both graphs are walked back to claimed values, the *border*. Never a border: parameters, values made from
sizes alone, and values that something is still written into in place. Tests whose parts share nodes are one cut. A
border comes before its tests in the graph, so that holding each cut alone holds the whole, by induction over the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import networkx
from torch import nn
from torch.fx import Graph, Node

from rewrite.analysis.writes import Writes
from rewrite.graph.program import Program
from rewrite.graph.relation import Relation

from .claims import Claims, Pair, is_tensor


@dataclass(frozen=True)
class Cut:
    """One part of a program in its old and its new form: border and outputs as pairs, the nodes between in order.

    ``written`` tells that something may be written into an output later: then it must not be an input of the part itself.
    ``related`` are the new nodes among border and outputs whose value is a function of the old one's.
    """

    border: tuple[Pair, ...]
    outputs: tuple[Pair, ...]
    old: tuple[Node, ...]
    new: tuple[Node, ...]
    reasons: tuple[str, ...]
    written: bool = False
    related: Mapping[Node, Relation] = field(default_factory=dict)

    @property
    def old_border(self) -> tuple[Node, ...]:
        """The border in the graph before."""
        return tuple(old for old, _ in self.border)

    @property
    def new_border(self) -> tuple[Node, ...]:
        """The border in the graph after."""
        return tuple(new for _, new in self.border)

    @property
    def name(self) -> str:
        """Where the cut is, in the words of the module paths of its new nodes."""
        paths = [str(n.target) for n in self.new if n.op == "call_module"] or [new.name for _, new in self.outputs]
        return ", ".join(dict.fromkeys(paths[:3])) + ", ..." * (len(paths) > 3)


class Cutter:
    """Finds the cuts of all tests of some claims."""

    def __init__(self, claims: Claims) -> None:
        self.claims = claims
        self.old_side = _Side(claims.before, claims.varying)
        self.new_side = _Side(claims.after, claims.varying, _new_layers(claims))
        self.careful = Writes(claims.after.graph, claims.after.module)
        self.partner = {new: old for new, old in claims.partner.items() if self._may_border(old, new)}
        self.claimant = {old: new for new, old in self.partner.items()}

    def cuts(self) -> list[Cut]:
        """Every cut, in the order of the graph."""
        parts = [self._part(pair) for pair in self.claims.tests]
        together = networkx.utils.UnionFind(range(len(parts)))
        for side in (0, 1):
            owner: dict[Node, int] = {}
            for i, (slices, _) in enumerate(parts):
                for node in slices[side]:
                    together.union(owner.setdefault(node, i), i)
        tests = list(self.claims.tests)
        groups = sorted(sorted(group) for group in together.to_sets())
        return [self._joined([parts[i] for i in group], [tests[i] for i in group]) for group in groups]

    def _may_border(self, old: Node, new: Node) -> bool:
        return is_tensor(new) and self.old_side.may_border(old) and self.new_side.may_border(new)

    def _part(self, pair: Pair) -> tuple[tuple[set[Node], set[Node]], set[Node]]:
        """The own nodes of both forms of one test (shared leaves aside), and the new nodes of its border.

        The border lies before the test: an input alone may be the test and its own border.
        """
        old, new = pair
        limit = self.new_side.place[new] + (new.op == "placeholder")
        border: set[Node] = set()

        def stops(claimant: Node | None) -> bool:
            if claimant not in self.partner or self.new_side.place[claimant] >= limit:
                return False
            border.add(claimant)
            return True

        left = _walked(old, lambda node: stops(self.claimant.get(node)))
        right = _walked(new, stops)
        return (self.old_side.own(left, old), self.new_side.own(right, new)), border

    def _joined(self, parts: Sequence[tuple[tuple[set[Node], set[Node]], set[Node]]], tests: Sequence[Pair]) -> Cut:
        inside = {new for old, new in tests if self.claims.partner.get(new) is old}
        border = set().union(*(b for _, b in parts)) - inside  # what is to be held is computed, not given
        old = self.old_side.whole(set().union(*(s[0] for s, _ in parts)), {self.partner[n] for n in border})
        new = self.new_side.whole(set().union(*(s[1] for s, _ in parts)), border)
        ordered = sorted(border, key=self.new_side.place.__getitem__)
        pairs = tuple((self.partner[n], n) for n in ordered)
        written = any(self.careful.into(new) for _, new in tests)
        ends = {node for _, node in (*pairs, *tests)}
        related = {node: relation for node, relation in self.claims.related.items() if node in ends}
        return Cut(pairs, tuple(tests), old, new, tuple(self.claims.tests[t] for t in tests), written, related)


class _Side:
    """One of the two graphs: the order of its nodes, and what can be a border in it."""

    def __init__(self, program: Program, varies: Collection[Node], fresh: Collection[nn.Module] = ()) -> None:
        graph: Graph = program.graph
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = Writes(graph, program.module, fresh)
        self.varies = varies

    def may_border(self, node: Node) -> bool:
        return node.op != "get_attr" and node in self.varies and self.writes.settled(node)

    def own(self, nodes: set[Node], test: Node) -> set[Node]:
        """Without the leaves that many parts share, unless it is what is tested: parameters, sizes, inputs."""
        return {n for n in nodes if n.op != "placeholder" and (n is test or n in self.varies)}

    def whole(self, own: set[Node], border: set[Node]) -> tuple[Node, ...]:
        """The nodes of a part with all that they need, back to the border, in order."""
        found: set[Node] = set()
        waiting = list(own)
        while waiting:
            node = waiting.pop()
            if node in found or node in border:
                continue
            found.add(node)
            waiting += node.all_input_nodes
        return tuple(sorted(found, key=self.place.__getitem__))


def _new_layers(claims: Claims) -> list[nn.Module]:
    """The layers of tests: that they give tensors of their own, where it matters, is seen when they run."""
    nodes = (new for _, new in claims.tests if new.op == "call_module")
    inserted = (n for n in claims.after.graph.nodes if n.op == "call_module" and n not in claims.partner)
    return [claims.after.layer(node) for node in (*nodes, *inserted)]


def _walked(start: Node, stops: Callable[[Node], bool]) -> set[Node]:
    """The nodes from ``start`` back to those at which ``stops`` says so."""
    found: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node not in found and not stops(node):
            found.add(node)
            waiting += node.all_input_nodes
    return found
