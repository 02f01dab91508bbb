"""The hidden axis of a sum: the one that the layers around it work on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import Node

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import aten, packet
from rewrite.graph.program import Program
from rewrite.torch_private import _BatchNorm

from . import carry
from .norms import norm_of
from .residuals import ADDS

_SCALES = (aten.mul, aten.mul_, aten.div, aten.div_, *ADDS)
_CONVOLUTIONS: Mapping[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
REACH = 64
"""How many nodes are looked at for the hidden axis of an addition."""


def hidden_axis(program: Program, add: Node) -> int | None:
    """The axis of a residual sum that the layers which write or read it work on, None where none can tell.

    The layers nearest before it are asked first, then those that read it.
    """
    for step in (_before, _behind):
        ahead: list[tuple[Node, dict[int, int]]] = [(add, {a: a for a in range(carry.dimensions(add))})]
        seen: set[Node] = set()
        while ahead and len(seen) < REACH:
            node, axes = ahead.pop(0)
            if node in seen:
                continue
            seen.add(node)
            found, after = step(program, node, axes)
            if found is not None:
                return found
            ahead += after
    return None


Step = tuple[int | None, list[tuple[Node, dict[int, int]]]]


def _before(program: Program, node: Node, axes: dict[int, int]) -> Step:
    """The axis of the sum that a node's own layer tells, or the operands to ask; ``axes`` maps the node's to the sum's."""
    own = _told(program, node, writes=True)
    if own is not None:
        return axes.get(own), []
    after = []
    for operand in node.all_input_nodes:
        found = ((a, _moved(program, node, operand, a)) for a in range(carry.dimensions(operand)))
        moved = {a: axes[b] for a, b in found if b in axes}
        if moved:
            after.append((operand, moved))
    return None, after


def _behind(program: Program, node: Node, axes: dict[int, int]) -> Step:
    after = []
    for user in node.users:
        own = _told(program, user, writes=False)
        if own is not None and user.args and user.args[0] is node:
            return axes.get(own % max(carry.dimensions(node), 1)), []
        moved = {b: to for a, to in axes.items() if (b := _moved(program, user, node, a)) is not None}
        if moved:
            after.append((user, moved))
    return None, after


def _moved(program: Program, node: Node, operand: Node, axis: int) -> int | None:
    """Where an axis goes, through what keeps the shape as well: activations, gains, norms of another axis."""
    found = carry.carried(program, node, operand, axis)
    if found is None and carry.sizes(node) is not None and carry.sizes(node) == carry.sizes(operand):
        return axis
    return found


def _told(program: Program, node: Node, writes: bool) -> int | None:
    """The hidden axis of what a node's layer gives (or takes), where its kind tells."""
    rank = carry.dimensions(node)
    if packet(node) in _SCALES:  # by a parameter that has one axis
        given = [a for a in node.args[:2] if isinstance(a, Node) and carry.is_constant(a)]
        sizes = carry.sizes(given[0]) if len(given) == 1 else None
        long = [rank - len(sizes) + i for i, s in enumerate(sizes) if s > 1] if sizes is not None else []
        return long[0] if len(long) == 1 and writes else None
    if node.op != "call_module" or rank == 0:
        return None
    norm = norm_of(program, node)
    if norm is not None:
        return norm.channel_axis % rank if len(norm.shape) == 1 else None
    layer = program.layer(node)
    for kind, spatial in _CONVOLUTIONS.items():
        if isinstance(layer, kind):
            return rank - spatial - 1
    if isinstance(layer, _BatchNorm | nn.GroupNorm):
        return min(1, rank - 1)
    return rank - 1 if isinstance(layer, nn.Linear | TransposedLinear | nn.Embedding) else None
