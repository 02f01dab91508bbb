"""Classes of cuts: cuts of the same code, layers and shapes, of which the first is probed for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.nodes import attribute, map_leaves
from rewrite.graph.relation import Chain, Relation
from rewrite.torch_private import pytree

from .cuts import Cut

Signature = tuple[Any, ...]
_BOOKKEEPING = frozenset({"_parameters", "_buffers", "_modules", "training"})


def signature(cut: Cut, before: nn.Module, after: nn.Module) -> Signature:
    """What two cuts share if they differ in values alone."""
    old = _form(cut.old, [a for a, _ in cut.border], [a for a, _ in cut.outputs], before)
    new = _form(cut.new, [b for _, b in cut.border], [b for _, b in cut.outputs], after)
    return (old, new, tuple(_kind(cut.related.get(b)) for _, b in (*cut.border, *cut.outputs)))


def _kind(relation: Relation | None) -> str:
    links = relation.links if isinstance(relation, Chain) else [relation] * (relation is not None)
    return " ".join(type(link).__qualname__ for link in links)


def _form(nodes: Sequence[Node], border: Sequence[Node], outputs: Sequence[Node], module: nn.Module) -> Signature:
    place = {node: i for i, node in enumerate([*border, *nodes])}
    rows = tuple(_row(node, place, module) for node in nodes)
    return (tuple(_value(n) for n in border), rows, tuple(place[n] for n in outputs))


def _row(node: Node, place: Mapping[Node, int], module: nn.Module) -> Signature:
    arguments = map_leaves((node.args, dict(node.kwargs)), lambda v: f"%{place[v]}" if isinstance(v, Node) else repr(v))
    target: Any = node.target
    if node.op in ("call_module", "get_attr"):
        target = _described(attribute(module, str(node.target)))
    return (node.op, str(target), repr(arguments), _value(node))


def _described(value: Any) -> str:
    """A layer by its type, plain attributes and tensors' shapes; a tensor by its shape."""
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {_tensor(value)}"
    if not isinstance(value, nn.Module):
        return repr(value)
    parts = []
    for name, module in value.named_modules():
        plain = {k: _plain(v) for k, v in vars(module).items() if k not in _BOOKKEEPING and not _is_noise(k, v)}
        tensors = {k: _tensor(t) for k, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}
        parts.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {plain} {tensors}")
    return "; ".join(parts)


def _plain(value: Any) -> str:
    """An attribute's text; a graph's with numbers for names, a mapping's item by item."""
    if isinstance(value, Mapping):
        return repr({k: _plain(v) for k, v in value.items()})
    if not isinstance(value, Graph):
        return repr(value)
    place = {node: i for i, node in enumerate(value.nodes)}
    named = [map_leaves((n.args, dict(n.kwargs)), lambda v: f"%{place[v]}" if isinstance(v, Node) else v) for n in place]
    return repr([(n.op, "" if n.op == "placeholder" else str(n.target), row) for n, row in zip(place, named, strict=True)])


def _is_noise(name: str, value: Any) -> bool:
    """Hooks that are none, and generated functions, whose text differs from one to the next."""
    return (isinstance(value, Mapping) and not value) or name in ("runs", "code")


def _tensor(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"


def _value(node: Node) -> str:
    value = node.meta.get("val")
    return repr(pytree.tree_map(lambda v: _tensor(v) if isinstance(v, torch.Tensor) else str(v), value))
