"""The residual structure of a model: which additions are residual, which norms sit on the stream itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Node
from torch.nn.modules.dropout import _DropoutNd

from .graphs import aten, packet, tensor_value
from .norms import Norm
from .program import Program
from .regions import Region

_ADDS = (aten.add, aten.add_)
_PASSING = (aten.reshape, aten.contiguous, aten.clone, aten.to, aten.flatten, aten.unflatten, aten.transpose,
            aten.permute, aten.detach)


@dataclass(frozen=True)
class ResidualAdd:
    """stream + branch(stream): ``skip`` is the value carried on, ``branch`` what was computed from it."""

    node: Node
    skip: Node
    branch: Node


def residual_adds(program: Program) -> list[ResidualAdd]:
    """Every addition one of whose operands was computed from the other, in execution order."""
    adds = [n for n in program.graph.nodes if packet(n) in _ADDS and _tensor_operands(n)]
    bits: dict[Node, int] = {}
    for add in adds:
        for operand in add.args[:2]:
            assert isinstance(operand, Node)
            source = passed_through(program, operand)
            bits.setdefault(source, 1 << len(bits))
    upstream: dict[Node, int] = {}
    for node in program.graph.nodes:
        above = 0
        for source in node.all_input_nodes:
            above |= upstream[source] | bits.get(source, 0)
        upstream[node] = above
    found = []
    for add in adds:
        left, right = add.args[0], add.args[1]
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        a, b = passed_through(program, left), passed_through(program, right)
        if a is not b and upstream[b] & bits[a]:
            found.append(ResidualAdd(add, a, b))
        elif a is not b and upstream[a] & bits[b]:
            found.append(ResidualAdd(add, b, a))
    return found


def _tensor_operands(node: Node) -> bool:
    shapes = [tensor_value(a) for a in node.args[:2]]
    return len(shapes) == 2 and all(v is not None and v.dim() >= 2 and v.is_floating_point() for v in shapes)


def passed_through(program: Program, node: Node) -> Node:
    """The value that ``node`` only carries on: casts, reshapes, dropout and stochastic depth are looked through."""
    while True:
        inner = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if inner is None:
            return node
        if packet(node) in _PASSING or (node.op == "call_module" and _carries(program.layer(node))):
            node = inner
        else:
            return node


def _carries(layer: nn.Module) -> bool:
    if isinstance(layer, Region):
        evaluation = layer.graphs.get("eval")
        return evaluation is not None and all(n.op in ("placeholder", "output") for n in evaluation.nodes) \
            and len(layer.graphs["train"].output_node().all_input_nodes) == 1
    return isinstance(layer, _DropoutNd | nn.Identity)


def post_norms(program: Program, norms: Sequence[Norm]) -> list[Norm]:
    """The norms of post-norm blocks: they normalize a residual sum, and the stream goes on from their output."""
    residuals = residual_adds(program)
    sums = {r.node for r in residuals}
    skips = {r.skip for r in residuals}
    found = []
    for norm in norms:
        source = norm.node.args[0]
        if isinstance(source, Node) and passed_through(program, source) in sums and norm.node in skips:
            found.append(norm)
    if found:  # the last norm of a post-norm model ends the stream: nothing is added to it any more
        found += [n for n in norms if n not in found and isinstance(n.node.args[0], Node)
                  and passed_through(program, n.node.args[0]) in sums and _follows(n, found)]
    return found


def _follows(norm: Norm, posts: Sequence[Norm]) -> bool:
    """Whether a norm is the second one of a post-norm block, by standing under the same block's name."""
    tail = norm.path.rpartition(".")[2]
    return any(p.path.rpartition(".")[2] == tail and p.path != norm.path for p in posts)
