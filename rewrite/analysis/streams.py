"""Streams: the values that hold one running sum, with the axis of its hidden dimension, who writes and who reads it.

A stream is everything that additions and what carries values on (`analysis.carry`) connect: in a pre-norm transformer
all residual sums of a stack, in a post-norm one each sum up to the norm that ends it.

    for stream in streams(program):
        print(stream.size, [node.name for node in stream.writers], [r.node.name for r in stream.readers])

An analysis is of one state of a program: ask again after an edit. The cost is linear in the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from rewrite.graph.nodes import aten, packet
from rewrite.graph.program import Program
from rewrite.torch_private import _DropoutNd

from . import carry
from .hidden import hidden_axis
from .residuals import ADDS, residual_adds


@dataclass(frozen=True)
class Reader:
    """A node that reads a stream's value: ``axis`` is the hidden axis of that value."""

    node: Node
    value: Node
    axis: int


@dataclass(frozen=True)
class Stream:
    """Values that hold one running sum of ``size`` hidden units.

    ``values`` maps each to the hidden axis that it has there, in execution order. ``writers`` are those that no addition
    and nothing that carries made: what enters. ``additions`` are its sums, ``residual`` those of a branch that was computed
    from the stream. ``offsets`` add the same number all along the hidden axis. ``dropouts`` are what drops single units
    of it in training, with their p. ``torn`` is a value reached with two different axes, None where all is well.
    """

    values: Mapping[Node, int]
    size: int
    writers: tuple[Node, ...]
    readers: tuple[Reader, ...]
    additions: frozenset[Node]
    residual: tuple[Node, ...]
    offsets: tuple[Node, ...] = ()
    dropouts: tuple[tuple[Node, float], ...] = ()
    torn: Node | None = field(default=None, repr=False)

    def __contains__(self, node: object) -> bool:
        return node in self.values


def streams(program: Program) -> list[Stream]:
    """Every stream with a residual addition, in execution order."""
    flow, found, seen = Flow(program), [], set[Node]()
    sums = dict.fromkeys(r.node for r in residual_adds(program))
    for add in sums:
        if add not in seen and (axis := hidden_axis(program, add)) is not None:
            stream = flow.through(add, axis, sums)
            seen.update(stream.values)
            found.append(stream)
    return found


def stream_of(program: Program, value: Node, axis: int) -> Stream:
    """The stream that a value belongs to, with or without a residual addition; ``axis`` is its hidden axis there."""
    return streams_of(program, [(value, axis)])[0]


def streams_of(program: Program, values: Sequence[tuple[Node, int]]) -> list[Stream]:
    """The stream of each value, given with its hidden axis: one and the same for all values of one stream."""
    flow, residual = Flow(program), {r.node for r in residual_adds(program)}
    known: dict[Node, Stream] = {}
    found = []
    for value, axis in values:
        if value not in known:
            stream = flow.through(value, axis % carry.dimensions(value), residual)
            known.update(dict.fromkeys(stream.values, stream))
        found.append(known[value])
    return found


class Flow:
    """What carries what on in one state of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}

    def through(self, value: Node, axis: int, residual: Collection[Node]) -> Stream:
        """The stream that holds a value: everything that it reaches forwards and backwards."""
        axes: dict[Node, int] = {}
        sources: dict[Node, list[tuple[Node, int]]] = {}
        readers: list[Reader] = []
        torn, ahead = None, [(value, axis)]
        while ahead:
            node, own = ahead.pop()
            if node in axes:
                torn = node if axes[node] != own else torn
                continue
            axes[node] = own
            sources[node] = list(carry.sources(self.program, node, own))
            ahead += sources[node]
            if node.op != "get_attr":  # others may read a parameter as another thing than this stream
                ahead += self._users(node, own, readers)
        values = {node: axes[node] for node in sorted(axes, key=self.order.__getitem__)}
        return Stream(
            values,
            carry.size(value, axis),
            writers=tuple(n for n in values if not sources[n]),
            readers=tuple(sorted(readers, key=lambda r: self.order[r.node])),
            additions=frozenset(n for n in values if packet(n) in ADDS),
            residual=tuple(n for n in values if n in residual),
            offsets=tuple(n for n in values if sources[n] and _adds_number(n, len(sources[n]))),
            dropouts=tuple((n, p) for n in values if (p := self._rate(n)) > 0),
            torn=torn,
        )

    def _users(self, node: Node, axis: int, readers: list[Reader]) -> Iterator[tuple[Node, int]]:
        """The users that carry a value on; the others are noted as its readers."""
        for user in node.users:
            moved = carry.carried(self.program, user, node, axis)
            if moved is not None:
                yield user, moved
            elif not carry.is_shape_alone(user, node):
                readers.append(Reader(user, node, axis))

    def _rate(self, node: Node) -> float:
        layer: Any = self.program.layer(node) if node.op == "call_module" else None
        return float(layer.p) if isinstance(layer, _DropoutNd) else 0.0


def _adds_number(node: Node, carried: int) -> bool:
    """Whether a sum has an operand that is the same all along the axis, and not 0."""
    if packet(node) not in (*ADDS, aten.where):
        return False
    operands = list(node.args[1:] if packet(node) is aten.where else node.args[:2])
    twice = len(operands) == 2 and operands[0] is operands[1]
    return carried < len([o for o in operands if isinstance(o, Node) or o != 0]) - twice
