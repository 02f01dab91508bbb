"""What a node costs, estimated from the shapes of its values: multiplications and additions of matrix products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import ScaledDotProductAttention
from rewrite.graph.nodes import aten, packet
from rewrite.graph.program import Program

from .carry import sizes
from .kinds import is_projection

_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.addmm, aten.mm)


def flops(program: Program, node: Node) -> float:
    """Floating-point operations of a node's matrix products and convolutions at the example's sizes; 0 for all else.

    A product of [n, k] and [k, m] counts 2 n k m; attention its two products.
    """
    made = sizes(node)
    if made is None:
        return 0.0
    if node.op == "call_module":
        return _of_layer(program.layer(node), node, made)
    data = [s for s in (sizes(a) for a in node.all_input_nodes) if s]
    if packet(node) in _PRODUCTS and len(data) >= 2:
        return 2.0 * math.prod(made) * data[-2][-1]
    return 2.0 * math.prod(made) * data[0][-1] if packet(node) is aten.linear and data else 0.0


def _of_layer(layer: nn.Module, node: Node, made: list[int]) -> float:
    if isinstance(layer, ScaledDotProductAttention):
        query, key = (sizes(a) for a in node.args[:2] if isinstance(a, Node))
        return 4.0 * math.prod(query or [0]) * (key or [0, 0])[-2]
    weight: Any = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() >= 2 and not isinstance(layer, nn.Embedding):
        channels = made[1] if weight.dim() > 2 and len(made) > 1 else made[-1]
        return 2.0 * math.prod(made) * weight.numel() / max(channels, 1)
    return 0.0


def depth_of(program: Program, node: Node) -> float:
    """1 for a projection, a convolution or a product of activations: a step that another one has to wait for."""
    return 1.0 if flops(program, node) > 0 or is_projection(program, node) else 0.0
