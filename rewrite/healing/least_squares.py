"""The closed form: the linear layer behind an edit, fitted so that the sum that it adds to is the original's.

With h the layer's input, V the new value and T the original's, ΔW and Δb minimize Σ |T - V - ΔW h - Δb|² + λ |ΔW, Δb|², with
λ a small part of the mean square of h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.program import Program

from .forward import Watching
from .pairs import Pair

RIDGES = (1e-2, 1e-4, 1e-6, 1e-8)
"""λ, as a part of the mean of the diagonal of Σ h hᵀ: what is best on data held back is taken."""
Inputs = Sequence[tuple[list[Any], list[Any]]]
"""Calls as flat graph inputs: the original's and the new program's."""


@dataclass(frozen=True)
class Fit:
    """One fitted layer: the error at the sum, relative, root mean square, on data held back, before and after."""

    path: str
    before: float
    after: float


@torch.no_grad()
def fit(
    old: Program, new: Program, found: Sequence[Pair], seen: Inputs, held: Inputs, tell: Callable[[str], None]
) -> list[Fit]:
    """Fit each pair's linear layer in turn, in place; one that is no better on what is held back stays as it was."""
    fits = []
    for pair in found:
        if pair.linear is None:
            continue
        tell(f"least squares at {pair.linear.target}")
        training, judged = (_Sums.of(old, new, pair, pair.linear, inputs) for inputs in (seen, held))
        after, change = min(((judged.error(c), c) for c in map(training.solved, RIDGES)), key=lambda found: found[0])
        if after < judged.error(None):
            _add(new.layer(pair.linear), change)
            fits.append(Fit(str(pair.linear.target), judged.error(None), after))
    return fits


@dataclass
class _Sums:
    """Σ h hᵀ, Σ h rᵀ, Σ |r|² and Σ |T|² over rows, with a last column of ones in h where the layer has a bias."""

    gram: torch.Tensor
    cross: torch.Tensor
    rest: float
    whole: float

    @classmethod
    def of(cls, old: Program, new: Program, pair: Pair, call: Node, inputs: Inputs) -> _Sums:
        source = call.args[0]
        assert isinstance(source, Node)
        theirs, ours = Watching(old, [pair.old]), Watching(new, [source, pair.new])
        made = cls(torch.zeros(()), torch.zeros(()), 0.0, 0.0)
        for before, after in inputs:
            (wanted,) = theirs.upto(before, pair.old)
            given, value = ours.upto(after, pair.new)
            made.take(given, wanted, wanted - value, new.layer(call).bias is not None)
        return made

    def take(self, given: torch.Tensor, wanted: torch.Tensor, missing: torch.Tensor, bias: bool) -> None:
        h = given.reshape(-1, given.shape[-1]).double()
        h = torch.cat([h, torch.ones_like(h[:, :1])], 1) if bias else h
        r = missing.reshape(-1, missing.shape[-1]).double()
        self.gram = self.gram.to(h) + h.mT @ h
        self.cross = self.cross.to(h) + h.mT @ r
        self.rest += float(r.square().sum())
        self.whole += float(wanted.double().square().sum())

    def solved(self, ridge: float) -> torch.Tensor:
        """[ΔW, Δb]ᵀ."""
        diagonal = self.gram.diagonal()
        damped = self.gram + torch.diag(torch.full_like(diagonal, ridge * float(diagonal.mean()) + 1e-12))
        change: torch.Tensor = torch.linalg.solve(damped, self.cross)
        return change

    def error(self, change: torch.Tensor | None) -> float:
        """√(Σ |r - Δ h|² / Σ |T|²)."""
        left = self.rest
        if change is not None:
            left += float((change * (self.gram @ change)).sum() - 2 * (change * self.cross).sum())
        return math.sqrt(max(left, 0.0) / max(self.whole, 1e-30))


def _add(layer: nn.Module, change: torch.Tensor) -> None:
    weight: Any = layer.weight
    bias: Any = layer.bias
    if bias is not None:
        change, shift = change[:-1], change[-1]
        bias.add_(shift.to(bias))
    weight.add_((change if isinstance(layer, TransposedLinear) else change.mT).to(weight))
