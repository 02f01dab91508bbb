"""The inputs that a program is recorded on: its example, fresh values, padded masks, a batch of one, two other sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rewrite.graph.program import Program
from rewrite.numerics.probes import fresh_inputs
from rewrite.numerics.sizes import dynamic_axes, resized

Inputs = list[torch.Tensor]

EXAMPLE, FRESH = "the example", "fresh values"
"""The inputs that a program was captured with, and others of the same shapes: both are tried in training too."""


def variants(program: Program, seed: int) -> Iterator[tuple[str, Inputs]]:
    """Named flat inputs of a program's graph, the example first; a variant that would repeat another is left out."""
    example = program.module.interface.bind(program.example_args, program.example_kwargs)
    yield EXAMPLE, example
    fresh, _ = fresh_inputs(tuple(example), {}, seed)
    yield FRESH, list(fresh)
    padded = [_padded(value) for value in example]
    if any(p is not e for p, e in zip(padded, example, strict=True)):
        yield "a padded mask", padded
    axes = dynamic_axes(program)
    if any(0 in by_axis for by_axis in axes):
        yield "a batch of one", resized(program, example, lambda d: 1 if d.axis == 0 else d.size)
    if any(axes):
        yield "a larger size", resized(program, example, lambda d: d.size + 1)
        yield "a smaller size", resized(program, example, lambda d: max(1 + (d.size > 1), d.size // 2))


def _padded(value: torch.Tensor) -> torch.Tensor:
    """A mask of ones with zeros at the end of every other row: an example of ones hides what a mask does."""
    is_mask = value.dtype is torch.bool or not value.is_floating_point()
    if not is_mask or value.dim() < 2 or value.shape[-1] < 3 or not bool((value == 1).all()):
        return value
    made = value.clone()
    made[::2, ..., -(value.shape[-1] // 3) :] = 0
    return made
