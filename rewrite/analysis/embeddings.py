"""Embeddings of a layer graph, with the number that the module multiplies them by and the offset of their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import aten, attribute, call_arguments, module_key, module_path, packet, tensor_value
from rewrite.graph.program import Program


@dataclass(frozen=True)
class Embedding:
    """One call of an embedding: y = scale · W[i + offset], W [rows, width].

    ``node`` gives W[i + offset] and ``value`` is y: the same node, or the product with ``scale`` in the same module call.
    ``scale_path`` is the tensor of one number that holds the scale, None where the code names it, or where it is 1;
    ``scale`` is then its value, and None on the meta device.
    """

    node: Node
    value: Node
    path: str
    weight_path: str
    rows: int
    width: int
    scale: float | None = 1.0
    scale_path: str | None = None
    offset: int = 0


def embeddings(program: Program) -> list[Embedding]:
    """Every call of an embedding layer, in execution order."""
    return [_embedding(program, node, layer) for node, layer in program.layers() if isinstance(layer, nn.Embedding)]


def _embedding(program: Program, node: Node, layer: nn.Embedding) -> Embedding:
    path = str(node.target)
    value, scale, scale_path = _scaled(program, node) or (node, 1.0, None)
    sizes = layer.num_embeddings, layer.embedding_dim
    return Embedding(node, value, path, f"{path}.weight", *sizes, scale, scale_path, _offset(program, node))


def _scaled(program: Program, node: Node) -> tuple[Node, float | None, str | None] | None:
    """The product with one number that is all that the module does with an embedding: its node, the number, its tensor."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) != 1 or packet(user) is not aten.mul or module_key(user) != module_key(node):
        return None
    named = call_arguments(user)
    factor = named["other"] if named["self"] is node else named["self"]
    if isinstance(factor, int | float):
        return user, float(factor), None
    if not isinstance(factor, Node):
        return None
    while packet(factor) is aten.to and isinstance(factor.args[0], Node):
        factor = factor.args[0]
    found: Any = attribute(program.module, str(factor.target)) if factor.op == "get_attr" else None
    if tensor_value(factor) is None or found is None or found.numel() != 1:
        return None
    return user, None if found.is_meta else float(found), str(factor.target)


def _offset(program: Program, node: Node) -> int:
    """What the embedding's own module adds to every index."""
    ids = node.args[0]
    if not isinstance(ids, Node) or packet(ids) is not aten.add or not module_path(ids).startswith(str(node.target)):
        return 0
    added = call_arguments(ids)["other"]
    return added if isinstance(added, int) else 0
