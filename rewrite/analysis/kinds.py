"""What a part of a graph is made of, and what kind of branch that makes it: attention, FFN, convolutional, other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.fx import Node
from torch.nn.modules import activation

from rewrite.graph.layers import ScaledDotProductAttention, TransposedLinear
from rewrite.graph.nodes import aten, packet
from rewrite.graph.program import Program
from rewrite.graph.spelled import SpelledActivation
from rewrite.torch_private import _BatchNorm

from .carry import is_constant, sizes
from .norms import norm_of

Kind = Literal["attention", "cross-attention", "ffn", "gated ffn", "experts", "convolutional", "other"]

PRODUCTS = (aten.matmul, aten.bmm, aten.einsum, aten.baddbmm)
_SUMMING = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    found for name in activation.__all__ if not issubclass(found := getattr(activation, name), _SUMMING)
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Parts:
    """The layers of a part of a graph, by what they do: ``first`` are the projections that nothing but norms, moves and
    splits stands before, ``projections`` all linear layers and convolutions of size 1, ``spatial`` the other convolutions.
    """

    kind: Kind
    first: tuple[Node, ...]
    projections: tuple[Node, ...]
    spatial: tuple[Node, ...]
    activations: tuple[Node, ...]


def parts_of(program: Program, nodes: Sequence[Node], norms: Collection[Node]) -> Parts:
    """What ``nodes`` (in execution order) are made of; ``norms`` are those of them that stand at their ends."""
    projections = tuple(n for n in nodes if is_projection(program, n))
    spatial = tuple(n for n in nodes if _is_layer(program, n, _CONVOLUTIONS) and n not in projections)
    acts = tuple(n for n in nodes if is_activation(program, n))
    inside = set(nodes)
    products = [operands for n in nodes if (operands := _mixed(program, n))]
    if products:
        within = any(all(o in inside for o in operands) for operands in products)
        kind: Kind = "attention" if within else "cross-attention"
    elif spatial:
        kind = "convolutional"
    elif any(packet(n) is aten.topk for n in nodes):
        kind = "experts"
    elif len(projections) > 1:
        kind = "gated ffn" if _gates(nodes, inside) else "ffn"
    else:
        kind = "other"
    return Parts(kind, tuple(_first(program, nodes, inside, projections)), projections, spatial, acts)


def is_projection(program: Program, node: Node) -> bool:
    """Whether a node maps each position's channels alone: a linear layer, a convolution of size 1, a product with a
    parameter.
    """
    if _is_layer(program, node, (nn.Linear, TransposedLinear)):
        return True
    if _is_layer(program, node, _CONVOLUTIONS):
        layer: Any = program.layer(node)
        return all(k == 1 for k in layer.kernel_size) and layer.groups == 1
    given = [a for a in node.args if isinstance(a, Node)]
    return packet(node) in (aten.addmm, aten.mm, aten.matmul, aten.linear) and any(a.op == "get_attr" for a in given)


def is_activation(program: Program, node: Node) -> bool:
    """Whether a node calls an activation function, spelled out or not."""
    return _is_layer(program, node, (*_ACTIVATIONS, SpelledActivation))


def is_norm(program: Program, node: Node) -> bool:
    """Whether a node normalizes, or is a layer that stands in the place of a norm."""
    if node.op != "call_module":
        return False
    layer = program.layer(node)
    kinds = (_BatchNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return norm_of(program, node) is not None or isinstance(layer, kinds) or hasattr(layer, "normalized_shape")


def _is_layer(program: Program, node: Node, kinds: tuple[type[nn.Module], ...]) -> bool:
    return node.op == "call_module" and isinstance(program.layer(node), kinds)


def _mixed(program: Program, node: Node) -> list[Node]:
    """The two activations that a node multiplies as matrices, as attention does; none where it does not."""
    if _is_layer(program, node, (ScaledDotProductAttention, nn.MultiheadAttention)):
        return [a for a in node.args[:2] if isinstance(a, Node)]
    data = [a for a in node.all_input_nodes if not is_constant(a)] if packet(node) in PRODUCTS else []
    return data if len(data) > 1 else []


def _gates(nodes: Sequence[Node], inside: set[Node]) -> bool:
    """Whether two values of one shape, both made here, are multiplied."""
    for node in nodes:
        if packet(node) in (aten.mul, aten.mul_):
            pair = [a for a in node.args if isinstance(a, Node) and a in inside]
            if len(pair) == 2 and pair[0] is not pair[1] and sizes(pair[0]) == sizes(pair[1]):
                return True
    return False


def _first(program: Program, nodes: Sequence[Node], inside: set[Node], projections: tuple[Node, ...]) -> list[Node]:
    """The projections that no other projection, activation or product stands before."""
    behind: set[Node] = set()
    found = []
    for node in nodes:
        later = any(a in behind for a in node.all_input_nodes)
        if node in projections and not later:
            found.append(node)
        if node in projections or later or _is_layer(program, node, _CONVOLUTIONS):
            behind.add(node)
    return found
