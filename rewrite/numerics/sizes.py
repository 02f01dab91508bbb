"""Inputs of other sizes: the same values along each dynamic dimension, fewer or again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rewrite.graph.program import Dimension, Program


def dynamic_axes(program: Program) -> list[dict[int, Dimension]]:
    """The dynamic dimensions of each graph input, by axis."""
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    return [{d.axis: d for d in program.dimensions if d.dynamic and d.input == name} for name in names]


def resized(program: Program, inputs: Sequence[torch.Tensor], size: Callable[[Dimension], int]) -> list[torch.Tensor]:
    """The inputs with ``size`` elements along each dynamic dimension: fewer, or the first ones again."""
    made = []
    for value, axes in zip(inputs, dynamic_axes(program), strict=True):
        for axis, dimension in axes.items():
            places = torch.arange(size(dimension), device=value.device) % value.shape[axis]
            value = value.index_select(axis, places)
        made.append(value)
    return made
