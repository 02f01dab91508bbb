"""The residual structure of a model: which additions are residual, which norms sit on the stream itself."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from rewrite.graph.layers import Scale
from rewrite.graph.nodes import aten, fixed_size, module_key, packet, tensor_value
from rewrite.graph.program import Program

from .carry import is_carrier, is_shape_alone, passed_on, scale_of
from .kinds import PRODUCTS
from .norms import Norm

ADDS = (aten.add, aten.add_)
_SOFTMAX = (aten.softmax, aten._softmax)
_PASSING = (
    aten.reshape,
    aten.contiguous,
    aten.clone,
    aten.to,
    aten.type_as,
    aten.flatten,
    aten.unflatten,
    aten.transpose,
    aten.permute,
    aten.detach,
)


@dataclass(frozen=True)
class ResidualAdd:
    """stream + branch(stream): ``skip`` is the value carried on, ``branch`` what was computed from it."""

    node: Node
    skip: Node
    branch: Node


def residual_adds(program: Program) -> list[ResidualAdd]:
    """Every addition one of whose operands was computed from the other, in execution order.

    The operand that is carried on has the sum's own sizes, and the sum is no attention's scores: a bias of all heads that an
    earlier layer used, from which all later layers are computed, is not carried on, with a mask of each sample in it or not.

    A parallel block adds several branches of one value, one after the other: there the second addition's branch was
    computed from what the first one started from.
    """
    downstream = _Downstream(program)
    origin: dict[Node, Node] = {}
    found: list[ResidualAdd] = []
    sums: set[Node] = set()
    for add in program.graph.nodes:
        if packet(add) not in ADDS or not _tensor_operands(add):
            continue
        operands = [operand for operand in add.args[:2] if isinstance(operand, Node)]
        left, right = (passed_through(program, operand) for operand in operands)
        for operand, skip, branch in ((operands[0], left, right), (operands[1], right, left)):
            if _broadcast(operand, add):
                continue
            starts = [skip, *([origin[skip]] if skip in origin else []), *_scaled(program, add, skip, sums)]
            start = next((s for s in starts if skip is not branch and downstream.of(s, branch)), None)
            if start is not None and not _are_scores(program, add):
                origin[add] = start
                found.append(ResidualAdd(add, skip, branch))
                sums.add(add)
                break
    return found


def _broadcast(operand: Node, add: Node) -> bool:
    """Whether an operand is the same along an axis of the sum, or has fewer axes."""
    own, whole = tensor_value(operand), tensor_value(add)
    if own is None or whole is None or own.dim() != whole.dim():
        return True
    return any(fixed_size(a) == 1 and fixed_size(b) != 1 for a, b in zip(own.shape, whole.shape, strict=True))


def _are_scores(program: Program, add: Node) -> bool:
    """Whether a sum is what an attention weighs by: a softmax alone reads it, and a product of matrices the weights."""
    node, weighed = add, False
    while len(readers := [user for user in node.users if not is_shape_alone(user, node)]) == 1:
        node = readers[0]
        if weighed and packet(node) in PRODUCTS:
            return True
        if _is_softmax(program, node):
            weighed = True
        elif packet(node) not in (*_PASSING, *ADDS) and not _carries(program, node):
            return False
    return False


def _is_softmax(program: Program, node: Node) -> bool:
    return packet(node) in _SOFTMAX or (node.op == "call_module" and isinstance(program.layer(node), nn.Softmax))


def _carries(program: Program, node: Node) -> bool:
    return node.op == "call_module" and is_carrier(program.layer(node))


def _scaled(program: Program, add: Node, skip: Node, sums: Collection[Node]) -> list[Node]:
    """What a skip is scaled from, where it is: a * x + F(x), with x a sum, or from outside of the module that adds."""
    data = scale_of(skip)
    data = None if data is None else passed_through(program, data)
    return [] if data is None or (data not in sums and module_key(data) == module_key(add)) else [data]


class _Downstream:
    """What was computed from what. Each value is followed no further than the last node that was asked about."""

    def __init__(self, program: Program) -> None:
        self._order = {node: i for i, node in enumerate(program.graph.nodes)}
        self._seen: dict[Node, set[Node]] = {}
        self._ahead: dict[Node, list[tuple[int, Node]]] = {}

    def of(self, source: Node, node: Node) -> bool:
        """Whether ``node`` was computed from ``source``."""
        seen, ahead = self._seen.setdefault(source, set()), self._ahead.setdefault(source, [(self._order[source], source)])
        while ahead and ahead[0][0] <= self._order[node]:
            _, reached = heapq.heappop(ahead)
            for user in reached.users:
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(ahead, (self._order[user], user))
        return node in seen


def _tensor_operands(node: Node) -> bool:
    shapes = [tensor_value(a) for a in node.args[:2]]
    return len(shapes) == 2 and all(v is not None and v.dim() >= 2 and v.is_floating_point() for v in shapes)


def passed_through(program: Program, node: Node) -> Node:
    """The value that ``node`` only carries on: casts, reshapes, dropout, stochastic depth and scales are looked through."""
    while True:
        layer = program.layer(node) if node.op == "call_module" else None
        carries = layer is not None and (is_carrier(layer) or isinstance(layer, Scale))
        inner = node.args[passed_on(layer) if layer is not None and carries else 0] if node.args else None
        if not isinstance(inner, Node) or not (carries or packet(node) in _PASSING):
            return node
        node = inner


def post_norms(program: Program, norms: Sequence[Norm]) -> list[Norm]:
    """The norms of post-norm blocks: they normalize a residual sum, and the stream goes on from their output."""
    residuals = residual_adds(program)
    sums, skips = {r.node for r in residuals}, {r.skip for r in residuals}
    normed = {norm.node: source for norm in norms if (source := _normed(program, norm)) is not None}
    found = {node for node, source in normed.items() if source in sums and node in skips}
    # the last norm of a post-norm model ends the stream: nothing is added to its output any more
    ends = {r.node for r in residuals if r.skip in found}
    return [norm for norm in norms if norm.node in found or normed.get(norm.node) in ends]


def _normed(program: Program, norm: Norm) -> Node | None:
    source = norm.node.args[0]
    return passed_through(program, source) if isinstance(source, Node) else None
