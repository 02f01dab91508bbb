"""Two flat graphs of one model, captured in different modes or dtypes, held against each other.

Nodes are matched in execution order by what they compute and where; what stays unmatched forms *chunks*: a run of nodes
of the first graph that stands where the second has another run (or nothing). Values that differ because of a chunk
are *switches*. A chunk becomes a region with one subgraph for each side, everything else stays as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from rewrite.graph.nodes import leaves, module_key, overload
from rewrite.graph.ops import limit_name

from .casts import cast_chain, is_idle, is_item, is_symbolic

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Arguments of operators that follow the model's mode.
MODE_ARGUMENTS = frozenset({"train", "training", "dropout_p", "dropout", "cudnn_enabled"})


@dataclass
class Chunk:
    """Positions ``[i1, i2)`` of the first graph's items against ``[j1, j2)`` of the second's, and the switches.

    Each switch is a pair of values (first graph's, second graph's) that later nodes use in each other's place.
    """

    i1: int
    i2: int
    j1: int
    j2: int
    first: list[Node] = field(default_factory=list)
    second: list[Node] = field(default_factory=list)
    switches: list[tuple[Any, Any]] = field(default_factory=list)
    uses: list[tuple[Node, int, int]] = field(default_factory=list)


@dataclass
class Alignment:
    """Partners of the first graph's nodes in the second, and the chunks where the two differ."""

    partner: dict[Node, Node]
    chunks: list[Chunk]


def signature(node: Node) -> tuple[Any, ...]:
    """What a node computes and where, without its data arguments and its training switches, dtypes relative."""
    found = overload(node)
    literals: list[Any] = []
    if found is not None:
        named = {a.name: i for i, a in enumerate(found._schema.arguments)}
        for name, place in named.items():
            value = node.args[place] if place < len(node.args) else node.kwargs.get(name)
            literals.append("*" if name in MODE_ARGUMENTS else _literal(value))
    else:
        literals = [_literal(node.args), _literal(dict(node.kwargs))]
    return (
        str(node.target),
        tuple(literals),
        module_key(node),
        tuple((c.kind, c.settings) for c in node.meta.get("contexts", ())),
    )


def _literal(value: Any) -> Any:
    if isinstance(value, Node):
        return "%"
    if isinstance(value, list | tuple):
        return tuple(_literal(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _literal(v)) for k, v in value.items())
    if isinstance(value, torch.dtype):
        return "dtype?" if value.is_floating_point else str(value)
    if isinstance(value, float):
        return next((name for d in _FLOATING if (name := limit_name(value, d)) is not None), repr(value))
    return repr(value)


def align(first: Graph, second: Graph) -> Alignment:
    """Match the nodes of two captures of one model, in whatever modes and dtypes."""
    a = [n for n in first.nodes if is_item(n)]
    b = [n for n in second.nodes if is_item(n)]
    chunks: list[Chunk] = []
    partner: dict[Node, Node] = {}
    for tag, i1, i2, j1, j2 in _opcodes([signature(n) for n in a], [signature(n) for n in b]):
        if tag == "equal":
            partner.update(zip(a[i1:i2], b[j1:j2], strict=True))
        else:
            chunks.append(Chunk(i1, i2, j1, j2))
    matcher = _Matcher(first, second, a, b, partner)
    return matcher.resolve([c for c in chunks if matcher.fill(c)])


def _opcodes(a: list[Any], b: list[Any]) -> list[tuple[str, int, int, int, int]]:
    """difflib's opcodes; the common head and tail are taken off first, since the matcher is slow on long inputs."""
    head = 0
    while head < min(len(a), len(b)) and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < min(len(a), len(b)) - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    middle = difflib.SequenceMatcher(None, a[head : len(a) - tail], b[head : len(b) - tail], autojunk=False)
    codes = [("equal", 0, head, 0, head)]
    codes += [(t, i1 + head, i2 + head, j1 + head, j2 + head) for t, i1, i2, j1, j2 in middle.get_opcodes()]
    return [*codes, ("equal", len(a) - tail, len(a), len(b) - tail, len(b))]


class _Matcher:
    """Checks the data flow of a matching and finds the switches of each chunk, merging chunks until all is consistent."""

    def __init__(self, first: Graph, second: Graph, a: list[Node], b: list[Node], partner: dict[Node, Node]) -> None:
        self.first, self.second, self.a, self.b = first, second, a, b
        self.partner = partner
        self.place_a = {n: i for i, n in enumerate(a)}
        self.place_b = {n: i for i, n in enumerate(b)}
        self.chunk_a: dict[Node, Chunk] = {}
        self.chunk_b: dict[Node, Chunk] = {}
        self.matched: set[Node] = set()

    def fill(self, chunk: Chunk) -> bool:
        """List a chunk's nodes; idle nodes alone make none."""
        chunk.first, chunk.second = self.a[chunk.i1 : chunk.i2], self.b[chunk.j1 : chunk.j2]
        return not all(is_idle(n) for n in [*chunk.first, *chunk.second])

    def resolve(self, chunks: list[Chunk]) -> Alignment:
        while True:
            self._index(chunks)
            merge = self._conflict(chunks)
            if merge is None:
                return Alignment(self.partner, chunks)
            chunks = self._merged(chunks, merge)

    def _index(self, chunks: list[Chunk]) -> None:
        self.chunk_a = {n: c for c in chunks for n in c.first}
        self.chunk_b = {n: c for c in chunks for n in c.second}
        self.matched = set(self.partner.values())
        for chunk in chunks:
            chunk.switches.clear()
            chunk.uses.clear()

    def _merged(self, chunks: list[Chunk], span: tuple[int, int, int, int]) -> list[Chunk]:
        i1, i2, j1, j2 = span
        grown = True
        rest = list(chunks)
        while grown:
            touching = [
                c
                for c in rest
                if (c.i1 <= i2 and i1 <= c.i2 and c.j1 <= j2 and j1 <= c.j2)
                or (i1 < c.i2 and c.i1 < i2)
                or (j1 < c.j2 and c.j1 < j2)
            ]
            rest = [c for c in rest if c not in touching]
            for c in touching:
                i1, i2, j1, j2 = min(i1, c.i1), max(i2, c.i2), min(j1, c.j1), max(j2, c.j2)
            grown = bool(touching)
            i1, i2, j1, j2 = self._closed(i1, i2, j1, j2)
        made = Chunk(i1, i2, j1, j2)
        self.fill(made)
        for node in made.first:
            self.partner.pop(node, None)
        return sorted([*rest, made], key=lambda c: (c.i1, c.j1))

    def _closed(self, i1: int, i2: int, j1: int, j2: int) -> tuple[int, int, int, int]:
        """Widen a span until each matched node inside has its partner inside."""
        inside = [(i, self.place_b[self.partner[n]]) for i, n in enumerate(self.a) if n in self.partner]
        for i, j in inside:
            if i1 <= i < i2 or j1 <= j < j2:
                i1, i2, j1, j2 = min(i1, i), max(i2, i + 1), min(j1, j), max(j2, j + 1)
        return i1, i2, j1, j2

    def _conflict(self, chunks: list[Chunk]) -> tuple[int, int, int, int] | None:
        """Collect the switches; the span to merge where a value cannot be switched, else None."""
        for user, other in self._matched_users():
            left, right = list(_data(user)), list(_data(other))
            for place in range(max(len(left), len(right))):
                x = cast_chain(left[place])[0] if place < len(left) else None
                y = right[place] if place < len(right) else None
                if self.same(x, y):
                    continue
                y = self._bare(y)
                chunk = self._chunk_of(x, y, user, other, chunks)
                if isinstance(chunk, tuple):
                    return chunk
                chunk.uses.append((user, place, _added(chunk.switches, (x, y))))
        for chunk in chunks:
            self._connect(chunk)
        return None

    def _connect(self, chunk: Chunk) -> None:
        """Let a chunk take what its nodes use of earlier chunks from those, where one mode alone has it."""
        for user in chunk.first:
            for place, value in enumerate(_data(user)):
                x = cast_chain(value)[0]
                home = self.chunk_a.get(x)
                if home is not None and home is not chunk:
                    home.uses.append((user, place, _added(home.switches, (x, None))))
        for user in chunk.second:
            for value in _data(user):
                y = self._bare(value)
                home = self.chunk_b.get(y)
                if home is not None and home is not chunk:
                    _added(home.switches, (None, y))

    def _matched_users(self) -> Iterator[tuple[Node, Node]]:
        for node in self.a:
            if node in self.partner:
                yield node, self.partner[node]
        yield self.first.output_node(), self.second.output_node()

    def _chunk_of(self, x: Any, y: Any, user: Node, other: Node, chunks: list[Chunk]) -> Chunk | tuple[int, int, int, int]:
        x = _under_idle(x, self.chunk_a)
        cx, cy = self.chunk_a.get(x), self.chunk_b.get(y)
        i, j = self.place_a.get(x, -1), self.place_b.get(y, -1)
        if cx is not None and cy is not None and cx is not cy:
            return (min(cx.i1, cy.i1), max(cx.i2, cy.i2), min(cx.j1, cy.j1), max(cx.j2, cy.j2))
        chunk = cx or cy
        if chunk is None:
            end_i, end_j = self.place_a.get(user, len(self.a)), self.place_b.get(other, len(self.b))
            usable = [c for c in chunks if i < c.i2 <= end_i and j < c.j2 <= end_j]
            if not usable:
                return (max(i, 0), end_i, max(j, 0), end_j)
            chunk = usable[-1]
        if i >= chunk.i2 or j >= chunk.j2:
            return (chunk.i1, max(i + 1, chunk.i2), chunk.j1, max(j + 1, chunk.j2))
        return chunk

    def same(self, x: Any, y: Any) -> bool:
        """Whether a value of the first graph is the second's, casts and idle nodes left aside."""
        x, y = cast_chain(x)[0], self._bare(y)
        if not isinstance(x, Node) or not isinstance(y, Node):
            return not isinstance(x, Node) and not isinstance(y, Node) and _literal_equal(x, y)
        if self.partner.get(x) is y:
            return True
        if x.op in ("placeholder", "get_attr"):
            return x.op == y.op and x.target == y.target
        if is_symbolic(x) and is_symbolic(y):
            left, right = list(leaves(x.args)), list(leaves(y.args))
            return x.target == y.target and len(left) == len(right) and all(map(self.same, left, right))
        if is_idle(x) and x not in self.chunk_a:
            return self.same(x.args[0], y)
        return False

    def _bare(self, y: Any) -> Any:
        """A value of the second graph without casts and idle nodes."""
        while isinstance(y, Node):
            bare = cast_chain(y)[0]
            if isinstance(bare, Node) and is_idle(bare) and bare not in self.matched:
                bare = bare.args[0]
            if bare is y:
                break
            y = bare
        return y


def _added(switches: list[tuple[Any, Any]], pair: tuple[Any, Any]) -> int:
    """The place of a pair among the switches, where it is added if it is new."""
    if pair not in switches:
        switches.append(pair)
    return switches.index(pair)


def _under_idle(x: Any, chunk_of: dict[Node, Chunk]) -> Any:
    while is_idle(x) and x not in chunk_of:
        x = cast_chain(x.args[0])[0]
    return x


def _literal_equal(x: Any, y: Any) -> bool:
    return type(x) is type(y) or x is None or y is None or x == y


def _data(node: Node) -> Iterator[Any]:
    """A node's data arguments: every leaf of its arguments."""
    yield from leaves(node.args)
    yield from leaves(dict(node.kwargs))
