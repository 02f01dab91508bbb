"""The inputs that a program is recorded on: its example, fresh values, padded masks, a batch of one, another size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rewrite.graph.program import Dimension, Program
from rewrite.numerics.probes import fresh_inputs

Inputs = list[torch.Tensor]


def variants(program: Program, seed: int) -> Iterator[tuple[str, Inputs]]:
    """Named flat inputs of a program's graph, the example first; a variant that would repeat another is left out."""
    example = program.module.interface.bind(program.example_args, program.example_kwargs)
    yield "the example", example
    fresh, _ = fresh_inputs(tuple(example), {}, seed)
    yield "fresh values", list(fresh)
    padded = [_padded(value) for value in example]
    if any(p is not e for p, e in zip(padded, example, strict=True)):
        yield "a padded mask", padded
    axes = _dynamic_axes(program)
    if any(d.axis == 0 for by_axis in axes for d in by_axis.values()):
        yield "a batch of one", _resized(example, axes, lambda d: 1 if d.axis == 0 else d.size)
    if any(axes):
        yield "another size", _resized(example, axes, lambda d: d.size + 1)


def _padded(value: torch.Tensor) -> torch.Tensor:
    """A mask of ones with zeros at the end of every other row: an example of ones hides what a mask does."""
    is_mask = value.dtype is torch.bool or not value.is_floating_point()
    if not is_mask or value.dim() < 2 or value.shape[-1] < 3 or not bool((value == 1).all()):
        return value
    made = value.clone()
    made[::2, ..., -(value.shape[-1] // 3) :] = 0
    return made


def _dynamic_axes(program: Program) -> list[dict[int, Dimension]]:
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    return [{d.axis: d for d in program.dimensions if d.dynamic and d.input == name} for name in names]


def _resized(
    inputs: Sequence[torch.Tensor], axes: Sequence[dict[int, Dimension]], size: Callable[[Dimension], int]
) -> Inputs:
    """The inputs with ``size`` elements along each dynamic dimension: fewer, or the first ones again."""
    made = []
    for value, by_axis in zip(inputs, axes, strict=True):
        for axis, dimension in by_axis.items():
            places = torch.arange(size(dimension), device=value.device) % value.shape[axis]
            value = value.index_select(axis, places)
        made.append(value)
    return made
