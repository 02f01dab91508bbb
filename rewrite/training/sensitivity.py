"""How much noise in each saved tensor disturbs the gradient, all of them at once: one forward and a few backward passes.

A tensor rounded at random to b bits has an error of variance ∝ 1 / (2^b - 1)², which adds C / (2^b - 1)² to the gradient's
variance. In backward pass k tensor l is restored with r_kl δ_l, r random signs and δ_l its error at PROBE bits: the gradient
moves by D_k = Σ_l r_kl A_l with A_l = J_l δ_l. Errors of different tensors are independent, A_l · A_m = 0 in the mean, so
D_j · D_k = Σ_l r_jl r_kl |A_l|²: K passes give K (K + 1) / 2 equations for the |A_l|², solved by least squares with no
|A_l|² below 0, and taken to be larger by two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Interpreter

from rewrite.graph.program import LayerGraph, Program
from rewrite.numerics.compare import on_copy
from rewrite.numerics.randomness import seeded

from .chain import unlinked
from .groups import as_pair, quantized, restored
from .packer import Storages, flat_storage
from .probed import projected, sampled_gradient

PROBE = 4
"""The bits at which errors are tried."""
_GROUP = 256
_SPARE = 8
_SURE = 2.0
"""How many standard errors are added to what was found, so that no tensor passes for insensitive by chance."""


@dataclass(frozen=True)
class Sensitivity:
    """A saved storage: how many numbers it has, and C, the gradient's variance that it causes at 1 bit."""

    size: int
    cost: float


def sensitivities(program: Program, inputs: Sequence[Any], min_size: int, seed: int) -> list[Sensitivity]:
    """The storages that compression can round, in its order, with their costs: one run on flat graph inputs in training.

    Those of fewer than ``min_size`` numbers are not tried: they cost 0.
    """

    def action(module: Any) -> list[Sensitivity]:
        with seeded(module.train(), seed), torch.enable_grad():
            return _measured(module, inputs, min_size, seed)

    return on_copy(program.module, action)


def _measured(module: LayerGraph, inputs: Sequence[Any], min_size: int, seed: int) -> list[Sensitivity]:
    noisy = _Noisy(Storages.of(module, [t for t in inputs if isinstance(t, torch.Tensor)]), seed)
    with saved_tensors_hooks(noisy.pack, noisy.unpack):
        outputs = Interpreter(module, graph=module.graph).run(*inputs)
    generator = torch.Generator().manual_seed(seed)
    loss = projected(outputs, generator)
    trained = [p for p in module.parameters() if p.requires_grad]
    costs = [0.0] * len(noisy.sizes)
    large = [place for place, size in enumerate(noisy.sizes) if size >= min_size]
    if large and loss is not None and trained:
        count = math.ceil((math.sqrt(8 * len(large) + 1) - 1) / 2) + _SPARE
        signs = 2.0 * torch.randint(2, (count, len(large)), generator=generator) - 1.0
        exact, moves = sampled_gradient(loss, trained, again=True), []
        for row in signs:
            noisy.signs = dict(zip(large, row.tolist(), strict=True))
            moves.append(sampled_gradient(loss, trained, again=True) - exact)
        squares, deviation = separated(signs.double(), torch.stack(moves))
        for place, square in zip(large, squares, strict=True):
            costs[place] = (square + _SURE * deviation) * (2**PROBE - 1) ** 2
    return [Sensitivity(size, cost) for size, cost in zip(noisy.sizes, costs, strict=True)]


def separated(signs: torch.Tensor, moves: torch.Tensor) -> tuple[list[float], float]:
    """The |A_l|² of ``moves`` [K, M] = ``signs`` [K, L] A, for A [L, M] whose rows are perpendicular in the mean; the
    standard error of one, by what the equations are off.
    """
    products = (moves @ moves.t()).double()
    first, second = torch.triu_indices(len(signs), len(signs)).unbind()
    design = (signs[first] * signs[second]).numpy()
    found, off = nnls(design, products[first, second].numpy(), maxiter=50 * design.shape[1])
    equations, unknown = design.shape
    deviation = float(off) / math.sqrt(max(equations - unknown, 1)) / math.sqrt(equations)
    return [float(value) for value in np.asarray(found)], deviation


class _Kept(NamedTuple):
    tensor: torch.Tensor
    number: int


@dataclass
class _Noisy:
    """Restores each storage with a sign times its rounding error."""

    storages: Storages
    seed: int
    numbers: dict[tuple[int, int, torch.dtype], int] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    signs: Mapping[int, float] = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> Any:
        key = self.storages.key(tensor)
        if key is None or not tensor.is_floating_point():
            return unlinked(tensor)
        if key not in self.numbers:
            flat = flat_storage(tensor)
            self.held.append(flat)  # keeps the key's address its own
            self.numbers[key] = -1 if as_pair(flat) is not None else len(self.sizes)
            self.sizes += [flat.numel()] * (self.numbers[key] >= 0)
        return _Kept(tensor.detach(), self.numbers[key]) if self.numbers[key] >= 0 else unlinked(tensor)

    def unpack(self, kept: Any) -> torch.Tensor:
        if not isinstance(kept, _Kept):
            found: torch.Tensor = kept
            return found
        sign = self.signs.get(kept.number, 0.0)
        if not sign:
            return kept.tensor
        flat = flat_storage(kept.tensor)
        generator = torch.Generator(flat.device).manual_seed(self.seed * 1_000_003 + kept.number)
        numbers = quantized(flat, PROBE, _GROUP, generator)
        moved = flat if numbers is None else flat + sign * (restored(numbers) - flat)
        return moved.as_strided(kept.tensor.shape, kept.tensor.stride(), kept.tensor.storage_offset())
