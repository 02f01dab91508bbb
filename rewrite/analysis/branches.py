"""Branches: what is computed from a stream and added to it, each with its kind, its norms, its projections, its layer.

    for branch in branches(program):
        print(branch.layer, branch.path, branch.kind, branch.order)

An analysis is of one state of a program: ask again after an edit. The cost is linear in the graph.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import Node

from rewrite.graph.nodes import aten, module_path, packet
from rewrite.graph.program import Program

from .carry import carried, is_shape_alone, scale_of
from .kinds import Kind, Parts, is_norm, parts_of
from .streams import Stream, streams

Order = Literal["pre", "post", "res-post", "peri", "inner", "none"]
"""Where a branch is normalized: at its start, after the addition, at its end, at its start and end, within, nowhere."""


@dataclass(frozen=True)
class Branch:
    """stream + F(stream): F is made of ``nodes``, read the stream at ``starts`` and adds ``output`` in ``addition``.

    ``output`` enters the stream as ``writer``, behind its ``scale`` (a LayerScale's product, a gain) and before its
    dropouts; ``carriers`` lead from there to the addition. ``other`` is what the branch is added to. ``layer`` counts the
    blocks of the model, from 0; ``block`` is the path of the branch's own one, "" outside of any. ``norms`` are those at its
    start, ``end_norms`` at its end, ``stream_norms`` those that read the sum. ``parallel``: another branch starts at the
    same values. ``leaks`` are nodes outside that read a
    value of its own, from its first projection on.
    """

    stream: Stream
    path: str
    layer: int
    kind: Kind
    order: Order
    parallel: bool
    addition: Node
    other: Node
    writer: Node
    output: Node
    starts: tuple[Node, ...]
    nodes: tuple[Node, ...]
    carriers: tuple[Node, ...]
    norms: tuple[Node, ...]
    end_norms: tuple[Node, ...]
    stream_norms: tuple[Node, ...]
    scale: Node | None
    dropouts: tuple[tuple[Node, float], ...]
    parts: Parts
    leaks: tuple[Node, ...]
    block: str = ""


def branches(program: Program, found: Sequence[Stream] | None = None) -> list[Branch]:
    """Every branch of every stream, in the order of their additions."""
    walk = _Walk(program)
    every = [b for stream in (streams(program) if found is None else found) for b in walk.of(stream)]
    every.sort(key=lambda b: walk.order[b.addition])
    starts = [frozenset(b.starts) for b in every]
    count = Counter(starts)
    blocks = _blocks([b.path for b in every], [b.kind for b in every])
    numbers = {block: n for n, block in enumerate(dict.fromkeys(blocks))}
    return [
        replace(b, layer=numbers[block], block=block, parallel=count[s] > 1)
        for b, block, s in zip(every, blocks, starts, strict=True)
    ]


class _Walk:
    """Walks from what enters a stream back to where it was computed from the stream."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}

    def of(self, stream: Stream) -> Iterator[Branch]:
        first = min(self.order[node] for node in stream.values)
        apart: set[Node] = set()
        for writer in stream.writers:
            nodes, starts = self._between(writer, stream, first, apart)
            path = self._to_addition(writer, stream)
            if starts and path is not None:
                yield self._branch(stream, writer, nodes, starts, *path)

    def _between(self, writer: Node, stream: Stream, first: int, apart: set[Node]) -> tuple[list[Node], list[Node]]:
        """The nodes that lead from the stream's values to a writer, and these values. ``apart`` is what none leads to."""
        ahead, seen = [writer], {writer}
        while ahead:
            for source in ahead.pop().all_input_nodes:
                if source in seen or source in stream or source in apart or not _is_data(source):
                    continue
                if self.order[source] >= first:
                    seen.add(source)
                    ahead.append(source)
        inside: dict[Node, None] = {}
        starts: dict[Node, None] = {}
        for node in sorted(seen, key=self.order.__getitem__):
            read = [s for s in node.all_input_nodes if s in stream and s is not writer and not is_shape_alone(node, s)]
            if read or any(s in inside for s in node.all_input_nodes):
                inside[node] = None
                starts.update(dict.fromkeys(read))
            elif node is not writer:
                apart.add(node)
        return (list(inside), list(starts)) if writer in inside else ([], [])

    def _to_addition(self, writer: Node, stream: Stream) -> tuple[list[Node], Node, Node] | None:
        """What carries a writer on, the first addition behind it, and that one's other operand."""
        carriers, node = list[Node](), writer
        while True:
            after = [u for u in node.users if carried(self.program, u, node, stream.values[node]) is not None]
            if len(after) != 1:
                return None
            (user,) = after
            if user in stream.additions:
                operands = [a for a in user.args[:2] if isinstance(a, Node)]
                other = next((o for o in operands if o is not node), None)
                return None if other is None else (carriers, user, other)
            carriers.append(user)
            node = user

    def _branch(
        self,
        stream: Stream,
        writer: Node,
        nodes: list[Node],
        starts: list[Node],
        carriers: list[Node],
        addition: Node,
        other: Node,
    ) -> Branch:
        inside = set(nodes)
        entries = [n for n in nodes if any(s in starts for s in n.all_input_nodes)]
        norms = tuple(n for n in entries if is_norm(self.program, n))
        end = self._end(writer, inside)
        sums = self._ending(stream, addition)
        inner = any(is_norm(self.program, n) for n in nodes)
        order: Order
        if len(norms) == len(entries):
            order = "peri" if end.norms else "pre"
        else:
            order = "res-post" if end.norms else "inner" if inner else "post" if sums else "none"
        beside = _beside(nodes, inside)
        own = inside | set(beside) | set(carriers) | {addition}
        parts = parts_of(self.program, nodes, {*norms, *end.norms})
        rates = [(n, p) for n, p in stream.dropouts if n in carriers]
        return Branch(
            stream,
            _path(parts, end.output),
            layer=0,
            kind=parts.kind,
            order=order,
            parallel=False,
            addition=addition,
            other=other,
            writer=writer,
            output=end.output,
            starts=tuple(starts),
            nodes=tuple(sorted([*nodes, *beside], key=self.order.__getitem__)),
            carriers=tuple(carriers),
            norms=norms,
            end_norms=end.norms,
            stream_norms=sums if order == "post" else (),
            scale=end.scale,
            dropouts=tuple(rates),
            parts=parts,
            leaks=tuple(u for n in (*self._inner(nodes, parts), *carriers) for u in n.users if u not in own),
        )

    def _inner(self, nodes: Sequence[Node], parts: Parts) -> list[Node]:
        """The nodes that are the branch's own: its first projections and all behind them; a norm may serve others too."""
        begun, inner = {*parts.projections, *parts.spatial}, dict[Node, None]()
        for node in nodes:
            if node in begun or any(s in inner for s in node.all_input_nodes):
                inner[node] = None
        return list(inner) if inner else list(nodes)

    def _ending(self, stream: Stream, addition: Node) -> tuple[Node, ...]:
        """The norms that end a stream behind its one sum: nothing but norms reads it, and nothing is added to it."""
        if len(stream.residual) > 1:
            return ()
        ahead, found = [addition], list[Node]()
        while ahead:
            for user in ahead.pop().users:
                if user in stream.additions:
                    return ()
                (ahead if user in stream else found).append(user)
        return tuple(found) if all(is_norm(self.program, n) for n in found) else ()

    def _end(self, writer: Node, inside: set[Node]) -> _End:
        """From what enters the stream back to the projection: its scale and norms on the way."""
        node, scale, norms = writer, None, []
        while True:
            if is_norm(self.program, node):
                norms.append(node)
                step = node.args[0] if node.args and isinstance(node.args[0], Node) else None
            else:
                step = scale_of(node)
                scale = node if step is not None and scale is None else scale
                step = step if step is not None else self._carried_from(node)
            if step is None or step not in inside:
                return _End(node, scale, tuple(norms))
            node = step

    def _carried_from(self, node: Node) -> Node | None:
        value = node.all_input_nodes
        one = len(value) == 1 and packet(node) not in (aten.add, aten.add_)
        return value[0] if one and carried(self.program, node, value[0], 0) is not None else None


@dataclass(frozen=True)
class _End:
    output: Node
    scale: Node | None
    norms: tuple[Node, ...]


def _beside(nodes: Sequence[Node], inside: Collection[Node]) -> list[Node]:
    """Numbers that are made of what lies inside and lead back there alone, with the constants that are made of them: the
    least number of a dtype, which a mask is filled with.
    """
    found = list[Node]()
    for number in dict.fromkeys(
        u for n in nodes for u in n.users if u not in inside and u.op != "output" and not _is_data(u)
    ):
        made = [u for u in number.users if u not in inside]
        if number.users and all(u.users and all(v in inside for v in u.users) for u in made):
            found += [number, *made]
    return list(dict.fromkeys(found))


def _is_data(node: Node) -> bool:
    """Whether a node yields tensors, not a size."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor | list | tuple)


def _path(parts: Parts, output: Node) -> str:
    """The module that holds all projections and convolutions of a branch."""
    named = [*parts.projections, *parts.spatial] or [output]
    paths = [(str(n.target) if n.op == "call_module" else module_path(n)).split(".") for n in named]
    level = zip(*paths, strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, level))


def _blocks(paths: Sequence[str], kinds: Sequence[Kind]) -> list[str]:
    """The path of each branch's block, "" outside of any. A block is the innermost numbered module that a branch shares
    with one of another kind right before or behind it; where it shares none, the innermost numbered one that it lies in.
    """
    blocks = []
    for i, path in enumerate(paths):
        own = _prefixes(path)
        near = [_prefixes(paths[j]) for j in (i - 1, i + 1) if 0 <= j < len(paths) and kinds[j] != kinds[i]]
        shared = [p for p in own if any(p in n for n in near)]
        blocks.append(".".join((shared or own)[-1]) if own else "")
    return blocks


def _prefixes(path: str) -> list[tuple[str, ...]]:
    """Every part of a path, from its beginning, that ends in a number; where none does, in a name with one (s3.b2)."""
    parts = tuple(path.split("."))
    numbered = [parts[: i + 1] for i, part in enumerate(parts) if part.isdigit()]
    return numbered or [parts[: i + 1] for i, part in enumerate(parts) if part[-1:].isdigit()]
