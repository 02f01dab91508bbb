"""Linear layers of which the backward keeps their input for nobody else: what saves memory where it is kept otherwise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import hint_of, tensor_value
from rewrite.graph.program import Program

from .kept import keeper


@dataclass(frozen=True)
class LinearSite:
    """A linear layer, or why its input is kept anyway (``obstacle``); ``company`` layers with it are given that input, which
    has so many ``rows`` at the example inputs.
    """

    path: str
    types: tuple[str, ...]
    layer: Any
    obstacle: str = ""
    company: int = 1
    rows: int = 0


def lone_linears(program: Program, done: Sequence[type[nn.Module]] = ()) -> list[LinearSite]:
    """The linear layers with a trained weight, each once; those of the classes ``done`` keep no input any more.

    Layers that are given the same value do not count against each other.
    """
    calls: dict[str, list[Node]] = {}
    layers: dict[str, Any] = {}
    for node, layer in program.layers():
        if type(layer) in (nn.Linear, TransposedLinear, *done):
            calls.setdefault(str(node.target), []).append(node)
            layers[str(node.target)] = layer
    every = {node for nodes in calls.values() for node in nodes}
    readers = Counter(node.all_input_nodes[0] for node in every)
    names: dict[int, list[str]] = {}
    for name, parameter in program.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        LinearSite(
            path,
            (type(layer).__name__,),
            layer,
            _obstacle(program, path, layer, calls[path], every, names),
            readers[calls[path][0].all_input_nodes[0]],
            _rows(calls[path][0].all_input_nodes[0]),
        )
        for path, layer in layers.items()
        if type(layer) not in done and layer.weight.requires_grad
    ]


def _rows(source: Node) -> int:
    value = tensor_value(source)
    return math.prod(hint_of(size) for size in value.shape[:-1]) if value is not None else 0


def _obstacle(
    program: Program, path: str, layer: Any, calls: Sequence[Node], every: set[Node], names: dict[int, list[str]]
) -> str:
    other = next((name for name in names[id(layer.weight)] if name != f"{path}.weight"), None)
    if other is not None:
        return f"it shares its weight with {other}"
    if len(calls) > 1:
        return "it is called more than once"
    (source,) = calls[0].all_input_nodes
    if source.op in ("placeholder", "get_attr"):
        return "what it is given is an input, which is kept anyway"
    keeps = keeper(program, source, besides=every, results=False)
    return f"what it is given is kept by {keeps} anyway" if keeps else ""
