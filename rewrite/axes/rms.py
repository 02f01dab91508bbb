"""RMS norms along a dimension that grows by zeros: mean x² is h/h' of what it was, so gain and eps change with it.

With n' entries of which n are the old ones, x' = [x 0]: mean x'² + eps' = (n/n') (mean x² + eps) for eps' = eps · n/n', and
the gain √(n/n') · g gives the old output. Source: Gesmundo and Maile, 2023, section 3.5, which leaves eps as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.norms import Norm, norms
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import attribute, call_arguments
from rewrite.graph.program import Program
from rewrite.graph.spelled import SpelledNorm

from .dims import Dim
from .table import Table

_GROUPED = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class Rescaled:
    """w -> factor · (w + offset) - offset: a gain that counts from ``offset``."""

    factor: float
    offset: float = 0.0

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The new weight."""
        return self.factor * (weight + self.offset) - self.offset if self.offset else self.factor * weight


def norms_along(program: Program, table: Table, dim: Dim) -> list[Norm]:
    """The norms that normalize along a dimension, or a product or sum that it is part of."""
    return [norm for norm in norms(program) if any(dim in d.atoms() for d in normalized(norm, table))]


def normalized(norm: Norm, table: Table) -> list[Dim]:
    """The dimensions that a norm normalizes."""
    axes = table.values.get(norm.node)
    if not isinstance(axes, list):
        return []
    return axes[len(axes) - len(norm.shape) :] if norm.channel_axis == -1 else [axes[norm.channel_axis]]


def zero_obstacle(program: Program, table: Table, dim: Dim) -> str:
    """Why the norms along a dimension would feel entries of zero; empty if they would not, once rescaled."""
    for norm in norms_along(program, table, dim):
        if norm.kind == "layer":
            return (
                f"LayerNorm at {norm.path} takes mean and variance along it, which zeros change: run rmsnorm first, or "
                "use method=lemon"
            )
        if norm.weight_path is None:
            return f"RMSNorm at {norm.path} has no gain to rescale: use method=lemon"
        if [d.root() for d in normalized(norm, table)] != [dim]:
            return f"RMSNorm at {norm.path} normalizes more than it"
    return other_norm(program, table, dim)


def other_norm(program: Program, table: Table, dim: Dim) -> str:
    """What normalizes groups of a dimension, in words; empty if nothing does."""
    for node, layer in program.layers():
        axes = table.values.get(node)
        if isinstance(layer, _GROUPED) and isinstance(axes, list) and dim in axes[1].atoms():
            return f"{type(layer).__name__} at {node.target} normalizes groups of it"
    return ""


def rescale(edit: Editor, found: list[Norm], ratio: float) -> None:
    """Let norms give what they gave once there are 1/``ratio`` times as many entries, the new ones 0."""
    for path, norm in {n.weight_path: n for n in found if n.weight_path is not None}.items():
        edit.set_parameter(path, Rescaled(math.sqrt(ratio), norm.offset), path)
    for path, norm in {n.path: n for n in found}.items():
        if norm.eps is None or norm.eps == 0:
            continue  # that of the dtype, which is rounding
        layer = attribute(edit.program.module, path)
        if isinstance(layer, SpelledNorm):
            for node, argument in _eps_of(layer, norm.eps):
                edit.set_literal(node, argument, norm.eps * ratio, path)
        edit.set_attribute(path, "eps", norm.eps * ratio)


def _eps_of(layer: SpelledNorm, eps: float) -> Iterator[tuple[Node, str]]:
    """Where the captured operators of a norm have its eps."""
    for graph in layer.graphs.values():
        for node in graph.nodes:
            named: dict[str, Any] = call_arguments(node)
            yield from ((node, name) for name, value in named.items() if isinstance(value, float) and value == eps)
