"""The gradient of a random projection of a model's outputs: what a compression is tried on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Interpreter

from rewrite.graph.program import Program
from rewrite.numerics.compare import on_copy
from rewrite.numerics.randomness import seeded
from rewrite.torch_private import pytree

_NUMBERS = 2**16
"""How many numbers of a parameter's gradient are looked at, evenly spread."""


class Choice(NamedTuple):
    """Bits, and what the gradient is off with them: relative, root mean square."""

    bits: int
    error: float


def fewest_bits(
    program: Program,
    inputs: Sequence[Any],
    layers: Callable[[int], Mapping[str, nn.Module]],
    choices: Iterable[int],
    bound: float,
    seed: int,
) -> Choice:
    """The first of the ``choices`` with whose ``layers`` in their places, by path, the gradient is within ``bound``, else
    the last: measured on flat graph inputs in training, with the same random numbers each time.
    """

    def action(module: nn.Module) -> Choice:
        exact, choice = _gradient(module, inputs, seed), Choice(0, 0.0)
        for bits in choices:
            for path, layer in layers(bits).items():
                module.set_submodule(path, layer)
            choice = Choice(bits, float((_gradient(module, inputs, seed) - exact).norm() / exact.norm().clamp(min=1e-30)))
            if choice.error <= bound:
                break
        return choice

    return on_copy(program.module, action)


def _gradient(module: Any, inputs: Sequence[Any], seed: int) -> torch.Tensor:
    with seeded(module.train(), seed), torch.enable_grad():
        outputs = Interpreter(module, graph=module.graph).run(*inputs)
    loss = projected(outputs, torch.Generator().manual_seed(seed))
    trained = [p for p in module.parameters() if p.requires_grad]
    return sampled_gradient(loss, trained) if loss is not None and trained else torch.zeros(1)


def projected(outputs: Any, generator: torch.Generator) -> torch.Tensor | None:
    """A random projection of all outputs that take a gradient."""
    loss = None
    for output in pytree.tree_leaves(outputs):
        if isinstance(output, torch.Tensor) and output.requires_grad and output.is_floating_point():
            weights = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            part = (output * weights).sum()
            loss = part if loss is None else loss + part
    return loss


def sampled_gradient(loss: torch.Tensor, trained: Sequence[torch.Tensor], *, again: bool = False) -> torch.Tensor:
    """The gradient in one row, float32; of a large parameter every k-th number, times √k. The graph stays for ``again``."""
    found = torch.autograd.grad(loss, trained, retain_graph=again, allow_unused=True)
    rows = []
    for gradient in found:
        if gradient is not None:
            every = -(-gradient.numel() // _NUMBERS)
            rows.append(gradient.reshape(-1)[::every].float().cpu() * math.sqrt(every))
    return torch.cat(rows)
