"""Two flat graphs of one model, captured in different modes or dtypes, held against each other.

Nodes are matched in execution order by what they compute and where; what stays unmatched forms *chunks*: a run of nodes
of the first graph that stands where the second has another run (or nothing). Values that differ because of a chunk
are *switches*. A chunk becomes a region with one subgraph for each side, everything else stays as it is.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from rewrite.graph.nodes import leaves, module_key, overload
from rewrite.graph.ops import limit_name

from .casts import cast_chain, is_idle, is_item, is_symbolic

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Arguments of operators that follow the model's mode.
MODE_ARGUMENTS = frozenset({"train", "training", "dropout_p", "dropout", "cudnn_enabled"})


@dataclass(eq=False)
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
    places: dict[Hashable, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the switches."""
        self.switches.clear()
        self.uses.clear()
        self.places.clear()

    def switch(self, x: Any, y: Any) -> int:
        """The place of a pair among the switches, where it is added if it is new."""
        place = self.places.setdefault((_name(x), _name(y)), len(self.switches))
        if place == len(self.switches):
            self.switches.append((x, y))
        return place


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
    numbers: dict[Hashable, int] = {}  # numbers are compared and hashed at once, signatures at length
    left, right = ([numbers.setdefault(signature(n), len(numbers)) for n in nodes] for nodes in (a, b))
    for tag, i1, i2, j1, j2 in _opcodes(left, right):
        if tag == "equal":
            partner.update(zip(a[i1:i2], b[j1:j2], strict=True))
        else:
            chunks.append(Chunk(i1, i2, j1, j2))
    matcher = _Matcher(first, second, a, b, partner)
    return matcher.resolve([c for c in chunks if matcher.fill(c)])


def _opcodes(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[str, int, int, int, int]]:
    """difflib's opcodes, in time linear in the length where most items occur once.

    What occurs once on both sides is an anchor, as far as the anchors stand in one order; what stands between two anchors
    is matched by itself, in the same way as long as it has anchors of its own, and by difflib in the end.
    """
    codes: list[tuple[str, int, int, int, int]] = []
    spans = [(0, len(a), 0, len(b))]
    while spans:
        i1, i2, j1, j2 = spans.pop()
        head, tail = _common_ends(a, b, i1, i2, j1, j2)
        if tail:
            spans.append((i2 - tail, i2, j2 - tail, j2))
        if head:
            codes.append(("equal", i1, i1 + head, j1, j1 + head))
        i1, i2, j1, j2 = i1 + head, i2 - tail, j1 + head, j2 - tail
        anchors = _anchors(a[i1:i2], b[j1:j2])
        if anchors:
            edges = [(i1, j1), *((i1 + i, j1 + j) for i, j in anchors), (i2, j2)]
            spans += [(x1, x2, y1, y2) for (x1, y1), (x2, y2) in reversed(list(pairwise(edges)))]
        elif i1 < i2 or j1 < j2:
            matcher = difflib.SequenceMatcher(None, a[i1:i2], b[j1:j2], autojunk=False)
            codes += [(t, x1 + i1, x2 + i1, y1 + j1, y2 + j1) for t, x1, x2, y1, y2 in matcher.get_opcodes()]
    return codes


def _common_ends(a: Sequence[Hashable], b: Sequence[Hashable], i1: int, i2: int, j1: int, j2: int) -> tuple[int, int]:
    """How many items two spans share at their heads, and how many of the others at their tails."""
    length, head, tail = min(i2 - i1, j2 - j1), 0, 0
    while head < length and a[i1 + head] == b[j1 + head]:
        head += 1
    while tail < length - head and a[i2 - 1 - tail] == b[j2 - 1 - tail]:
        tail += 1
    return head, tail


def _anchors(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """The longest run of items, in the order of both, that occur once in each: their places."""
    counts_a, counts_b = Counter(a), Counter(b)
    place_b = {item: j for j, item in enumerate(b)}
    pairs = [(i, place_b[item]) for i, item in enumerate(a) if counts_a[item] == 1 and counts_b[item] == 1]
    ends: list[int] = []  # the last place in b of the best run of each length
    best: list[int] = []  # the pair that ends it
    before: list[int] = []
    for number, (_, j) in enumerate(pairs):
        length = bisect.bisect_left(ends, j)
        if length == len(ends):
            ends.append(j)
            best.append(number)
        ends[length], best[length] = j, number
        before.append(best[length - 1] if length else -1)
    run, number = [], best[-1] if best else -1
    while number >= 0:
        run.append(pairs[number])
        number = before[number]
    return run[::-1]


class _Matcher:
    """Checks the data flow of a matching and finds the switches of each chunk, merging chunks until all is consistent."""

    def __init__(self, first: Graph, second: Graph, a: list[Node], b: list[Node], partner: dict[Node, Node]) -> None:
        self.first, self.second, self.a, self.b = first, second, a, b
        self.partner = partner
        self.place_a = {n: i for i, n in enumerate(a)}
        self.place_b = {n: i for i, n in enumerate(b)}
        self.chunk_a: dict[Node, Chunk] = {}
        self.chunk_b: dict[Node, Chunk] = {}
        self.inverse: dict[Node, Node] = {}
        self.chunks: list[Chunk] = []

    def fill(self, chunk: Chunk) -> bool:
        """List a chunk's nodes; idle nodes alone make none."""
        chunk.first, chunk.second = self.a[chunk.i1 : chunk.i2], self.b[chunk.j1 : chunk.j2]
        return not all(is_idle(n) for n in [*chunk.first, *chunk.second])

    def resolve(self, chunks: list[Chunk]) -> Alignment:
        while True:
            self._index(chunks)
            conflicts = self._conflicts()
            if not conflicts:
                for chunk in self.chunks:
                    self._connect(chunk)
                return Alignment(self.partner, self.chunks)
            for user, other, x, y in conflicts:
                span = self._chunk_of(x, y, user, other)
                if user not in self.chunk_a and not isinstance(span, Chunk):  # no earlier merge settled it
                    self._merge(span)
            chunks = self.chunks

    def _index(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.chunk_a = {n: c for c in chunks for n in c.first}
        self.chunk_b = {n: c for c in chunks for n in c.second}
        self.inverse = {theirs: ours for ours, theirs in self.partner.items()}
        for chunk in chunks:
            chunk.clear()

    def _merge(self, span: tuple[int, int, int, int]) -> None:
        """Make one chunk of a span and of the chunks that it touches, and of all that their nodes are partners of."""
        while True:
            touched = self.chunks[self._touching(*span)]
            grown = self._closed(
                min([span[0], *(c.i1 for c in touched)]),
                max([span[1], *(c.i2 for c in touched)]),
                min([span[2], *(c.j1 for c in touched)]),
                max([span[3], *(c.j2 for c in touched)]),
            )
            if grown == span:
                break
            span = grown
        made = Chunk(*span)
        self.fill(made)
        self.chunks[self._touching(*span)] = [made]
        for node in made.first:
            if node in self.partner:
                del self.inverse[self.partner.pop(node)]
            self.chunk_a[node] = made
        for node in made.second:
            self.chunk_b[node] = made

    def _touching(self, i1: int, i2: int, j1: int, j2: int) -> slice:
        """The chunks that a span overlaps on either side or adjoins on both, and those between; empty, where it belongs.

        Chunks stand in order on both sides, so that each of these is a search.
        """

        def first(beyond: Callable[[Chunk], bool]) -> int:
            return bisect.bisect_left(self.chunks, True, key=beyond)

        spans = [
            (first(lambda c: c.i2 > i1), first(lambda c: c.i1 >= i2)),
            (first(lambda c: c.j2 > j1), first(lambda c: c.j1 >= j2)),
            (first(lambda c: c.i2 >= i1 and c.j2 >= j1), first(lambda c: c.i1 > i2 or c.j1 > j2)),
        ]
        found = [(low, high) for low, high in spans if low < high]
        if not found:
            return slice(spans[-1][1], spans[-1][1])
        return slice(min(low for low, _ in found), max(high for _, high in found))

    def _closed(self, i1: int, i2: int, j1: int, j2: int) -> tuple[int, int, int, int]:
        """Widen a span until each matched node inside has its partner inside."""
        seen_a, seen_b = range(i1, i1), range(j1, j1)
        while (seen_a, seen_b) != (range(i1, i2), range(j1, j2)):
            new_a = [i for i in range(i1, i2) if i not in seen_a and self.a[i] in self.partner]
            new_b = [j for j in range(j1, j2) if j not in seen_b and self.b[j] in self.inverse]
            seen_a, seen_b = range(i1, i2), range(j1, j2)
            places_b = [self.place_b[self.partner[self.a[i]]] for i in new_a]
            places_a = [self.place_a[self.inverse[self.b[j]]] for j in new_b]
            i1, i2 = min([i1, *places_a]), max([i2, *(i + 1 for i in places_a)])
            j1, j2 = min([j1, *places_b]), max([j2, *(j + 1 for j in places_b)])
        return i1, i2, j1, j2

    def _conflicts(self) -> list[tuple[Node, Node, Any, Any]]:
        """Collect the switches of each chunk; the uses where a value cannot be switched."""
        conflicts = []
        for user, other in self._matched_users():
            left, right = list(_data(user)), list(_data(other))
            for place in range(max(len(left), len(right))):
                x = cast_chain(left[place])[0] if place < len(left) else None
                y = right[place] if place < len(right) else None
                if self.same(x, y):
                    continue
                y = self._bare(y)
                chunk = self._chunk_of(x, y, user, other)
                if isinstance(chunk, Chunk):
                    chunk.uses.append((user, place, chunk.switch(x, y)))
                else:
                    conflicts.append((user, other, x, y))
        return conflicts

    def _connect(self, chunk: Chunk) -> None:
        """Let a chunk take what its nodes use of earlier chunks from those, where one mode alone has it."""
        for user in chunk.first:
            for place, value in enumerate(_data(user)):
                x = cast_chain(value)[0]
                home = self.chunk_a.get(x)
                if home is not None and home is not chunk:
                    home.uses.append((user, place, home.switch(x, None)))
        for user in chunk.second:
            for value in _data(user):
                y = self._bare(value)
                home = self.chunk_b.get(y)
                if home is not None and home is not chunk:
                    home.switch(None, y)

    def _matched_users(self) -> Iterator[tuple[Node, Node]]:
        for node in self.a:
            if node in self.partner:
                yield node, self.partner[node]
        yield self.first.output_node(), self.second.output_node()

    def _chunk_of(self, x: Any, y: Any, user: Node, other: Node) -> Chunk | tuple[int, int, int, int]:
        """The chunk that gives ``x`` in the one graph and ``y`` in the other; else the span that has to become one."""
        x = _under_idle(x, self.chunk_a)
        cx, cy = self.chunk_a.get(x), self.chunk_b.get(y)
        i, j = self.place_a.get(x, -1), self.place_b.get(y, -1)
        if cx is not None and cy is not None and cx is not cy:
            return (min(cx.i1, cy.i1), max(cx.i2, cy.i2), min(cx.j1, cy.j1), max(cx.j2, cy.j2))
        chunk = cx or cy
        if chunk is None:
            end_i, end_j = self.place_a.get(user, len(self.a)), self.place_b.get(other, len(self.b))
            before = bisect.bisect_left(self.chunks, True, key=lambda c: c.i2 > end_i or c.j2 > end_j)
            chunk = self.chunks[before - 1] if before else None  # the last one before both users
            if chunk is None or i >= chunk.i2 or j >= chunk.j2:
                return (max(i, 0), end_i, max(j, 0), end_j)
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
            if isinstance(bare, Node) and is_idle(bare) and bare not in self.inverse:
                bare = bare.args[0]
            if bare is y:
                break
            y = bare
        return y


def _name(value: Any) -> Hashable:
    """What tells two values of a graph apart."""
    return value if isinstance(value, Node) or value is None else (type(value), repr(value))


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
