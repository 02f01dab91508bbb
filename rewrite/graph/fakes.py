"""FakeTensor values of nodes: shapes and dtypes without computing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.torch_private import FakeTensor, FakeTensorMode, pytree

from .nodes import attribute

Fakes = dict[tuple[Any, ...], torch.Tensor]
"""FakeTensors of one mode, by size, stride, dtype and device."""


def fake_value(module: nn.Module, node: Node, values: Mapping[Node, Any] | None = None, known: Fakes | None = None) -> Any:
    """What a node computes on FakeTensors: those in ``values``, else the ones that its inputs carry.

    ``known`` keeps the fakes of parameters from call to call: making them costs as much as the layer.
    """
    known = {} if known is None else known

    def fake(source: Node) -> Any:
        return values[source] if values is not None and source in values else source.meta.get("val")

    args = torch.fx.map_arg(node.args, fake)
    kwargs = torch.fx.map_arg(dict(node.kwargs), fake)
    mode = _fake_mode([args, kwargs]) or _fake_mode([n.meta.get("val") for n in node.graph.nodes])
    with mode or _nothing(), torch.no_grad():
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        layer = attribute(module, str(node.target))
        if mode is None:
            return layer(*args, **kwargs)
        state = {name: _fake(t, known) for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
        with _evaluating(layer):
            return torch.func.functional_call(layer, state, args, kwargs)


def _fake(tensor: torch.Tensor, known: Fakes) -> torch.Tensor:
    """A tensor like this one, made under the current mode."""
    layout = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if layout not in known:
        known[layout] = torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=layout[3])
    return known[layout]


@contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    """The layer in evaluation mode: in training some read data, which fake tensors do not have."""
    modes = {part: part.training for part in layer.modules()}
    layer.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _fake_mode(values: Any) -> FakeTensorMode | None:
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return None
