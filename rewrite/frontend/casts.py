"""Casts, switched-off dropouts and reads of single numbers: nodes that alignment looks through."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from rewrite.graph.nodes import aten, packet, tensor_value

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default)

_DROPOUTS = (
    aten.dropout,
    aten.dropout_,
    aten.feature_dropout,
    aten.feature_dropout_,
    aten.alpha_dropout,
    aten.alpha_dropout_,
    aten.feature_alpha_dropout,
    aten.feature_alpha_dropout_,
)


def cast_chain(node: Any) -> tuple[Any, tuple[torch.dtype, ...]]:
    """The value under any floating-point casts of ``node``, and the dtypes it is cast to, innermost first.

    Casts that change nothing do not count: an export attributes later uses of a value to them.
    """
    base, nodes = cast_nodes(node)
    return base, tuple(n.meta["val"].dtype for n in nodes)


def cast_nodes(node: Any) -> tuple[Any, tuple[Node, ...]]:
    """As ``cast_chain``, with the casts' nodes."""
    chain: list[Node] = []
    while isinstance(node, Node) and is_cast(node):
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = tensor_value(source), tensor_value(node)
        assert before is not None
        assert after is not None
        if before.dtype != after.dtype:
            chain.insert(0, node)
        node = source
    return node, tuple(chain)


def is_cast(node: Node) -> bool:
    """Whether a node only changes a floating tensor's dtype, or nothing at all."""
    if node.op != "call_function" or node.target not in _CASTS:
        return False
    source, result = tensor_value(node.args[0]), tensor_value(node)
    if source is None or result is None or source.device != result.device or "copy" in node.kwargs:
        return False
    if any(a is True for a in node.args[2:]) or node.kwargs.get("memory_format") is not None:
        return False
    return source.dtype == result.dtype or (source.is_floating_point() and result.is_floating_point())


def is_idle(node: Any) -> bool:
    """Whether a node hands its input's values on in evaluation: a dropout, or ``contiguous``, which a capture only
    records where the example's strides needed it.
    """
    return isinstance(node, Node) and (packet(node) in _DROPOUTS or packet(node) is aten.contiguous)


def is_symbolic(node: Node) -> bool:
    """Whether a node computes a size rather than a tensor."""
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def is_item(node: Node) -> bool:
    """Whether a node takes part in the matching; sizes and casts are compared where they are used."""
    return node.op == "call_function" and not is_cast(node) and not is_symbolic(node)
