"""The residual structure of a model: which additions are residual, which norms sit on the stream itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import aten, packet, tensor_value
from rewrite.graph.program import Program
from rewrite.graph.regions import Region
from rewrite.torch_private import _DropoutNd

from .norms import Norm

_ADDS = (aten.add, aten.add_)
_PASSING = (
    aten.reshape,
    aten.contiguous,
    aten.clone,
    aten.to,
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
    found: dict[Node, ResidualAdd] = {}
    origin: dict[Node, int] = {}
    for add in adds:
        left, right = (passed_through(program, operand) for operand in add.args[:2] if isinstance(operand, Node))
        for skip, branch in ((left, right), (right, left)):
            if skip is branch or add in found:
                continue
            if upstream[branch] & bits[skip]:
                origin[add] = bits[skip]
            elif upstream[branch] & origin.get(skip, 0):  # a parallel block adds several branches of one value
                origin[add] = origin[skip]
            else:
                continue
            found[add] = ResidualAdd(add, skip, branch)
    return list(found.values())


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
        return (
            evaluation is not None
            and all(n.op in ("placeholder", "output") for n in evaluation.nodes)
            and len(layer.graphs["train"].output_node().all_input_nodes) == 1
        )
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
    ends = {r.node for r in residuals if r.skip in {norm.node for norm in found}}
    for norm in norms:  # the last norm of a post-norm model ends the stream: nothing is added to its output any more
        source = norm.node.args[0]
        if norm not in found and isinstance(source, Node) and passed_through(program, source) in ends:
            found.append(norm)
    return found
