"""Deeper by identities (Net2DeeperNet): f(W x) becomes f(I f(W x)) for an activation with f(f(x)) = f(x).

I is a layer of the kind before, a linear layer or a convolution whose kernel is 1 in the middle. GELU, tanh and their kin
are not idempotent: a second one would be felt.

Source: Chen, Goodfellow and Shlens, Net2Net, ICLR 2016 (arXiv 1511.05641), section 2.3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.edit import Editor
from rewrite.graph.program import Program
from rewrite.torch_private import _BatchNorm

from .inserting import insert_behind

IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OTHERS = (nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.Softplus, nn.Mish, nn.Hardswish, nn.LeakyReLU)


@dataclass(frozen=True)
class Deepening:
    """An activation behind ``layer``, a linear layer or a convolution. ``obstacle`` is why it has to stay."""

    node: Node
    layer: nn.Module
    obstacle: str = ""

    @property
    def path(self) -> str:
        """The activation's path."""
        return str(self.node.target)

    @property
    def types(self) -> tuple[str, ...]:
        """Names that ``type:`` selects it by."""
        return ("layers",)


def deepenings(program: Program) -> list[Deepening]:
    """Every activation behind a linear layer or a convolution, BatchNorm between them or not."""
    found = []
    for node, layer in program.layers():
        before = _written_by(program, node) if isinstance(layer, IDEMPOTENT + _OTHERS) else None
        if before is None:
            continue
        source, reason = node.all_input_nodes[0], ""
        if not isinstance(layer, IDEMPOTENT):
            reason = f"{type(layer).__name__} is not idempotent: a second one behind it would be felt; that takes a ReLU"
        elif len(source.users) > 1:
            reason = f"{source.name} is read by others too"
        found.append(Deepening(node, before, reason))
    return found


def _written_by(program: Program, node: Node) -> nn.Module | None:
    """The linear layer or convolution whose value an activation is given, through BatchNorm or not."""
    source = node.all_input_nodes[0]
    if source.op == "call_module" and isinstance(program.layer(source), _BatchNorm):
        source = source.all_input_nodes[0]
    layer = program.layer(source) if source.op == "call_module" else None
    return layer if type(layer) in (nn.Linear, *_CONVOLUTIONS) else None


def deepen_by_identities(edit: Editor, chosen: Sequence[tuple[Deepening, int]]) -> None:
    """Put so many identities, each behind an activation of its own, before the activations that there are."""
    for site, more in chosen:
        for _ in range(more):
            _deepen(edit, site)


def _deepen(edit: Editor, site: Deepening) -> None:
    made: Any = copy.deepcopy(edit.program.layer(site.node))
    made.inplace = False
    source = site.node.all_input_nodes[0]
    first = insert_behind(edit, source, "act", made, users=lambda user: user is site.node)
    insert_behind(edit, first, "deeper", identity_like(site.layer), users=lambda user: user is site.node)


def identity_like(layer: Any) -> nn.Module:
    """A layer of a kind and dtype that gives what it is given, on as many channels as ``layer`` writes; trained."""
    weight, bias = layer.weight, layer.bias is not None
    how: dict[str, Any] = {"bias": bias, "device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        made: Any = nn.Linear(layer.out_features, layer.out_features, **how)
    else:
        sizes = tuple(size if size % 2 else 1 for size in layer.kernel_size)
        padding = tuple(size // 2 for size in sizes)
        made = type(layer)(layer.out_channels, layer.out_channels, sizes, padding=padding, **how)
    with torch.no_grad():
        nn.init.zeros_(made.weight)
        middle = tuple(size // 2 for size in made.weight.shape[2:])
        for i in range(len(made.weight)):
            made.weight[(i, i, *middle)] = 1
        if bias:
            nn.init.zeros_(made.bias)
    return made.train(layer.training)  # type: ignore[no-any-return]
