"""Activations scaled down behind each residual sum, gradients not (GPAS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.graph.nodes import tensor_value
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.placing import Placing, Surroundings
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.analysis.branches import Branch
    from rewrite.pipeline.context import Context


class GradientPreservingScale(nn.Module):
    """y = x - SiLU(gate) · x, where the gradient takes the second x for a constant: dy/dx = 1."""

    def __init__(self, gate: torch.Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - F.silu(self.gate) * x.detach()


@dataclass(frozen=True)
class GPAS(Placing):
    """Scale the stream down behind each residual sum and leave the gradient: x becomes x - SiLU(g) · stop_gradient(x).

    g is one trained number for each sum and starts at 0: at insertion function and gradients are the same. In training a
    positive g shrinks what deep layers see, whose variance grows from sum to sum in pre-norm models, without shrinking
    the gradient on its way back.

    Left alone, with the reason: sums that a norm follows (post-norm), that are written in place, or that have it already.

    Source: Chen et al., "GPAS: Accelerating Convergence of LLM Pretraining via Gradient-Preserving Activation Scaling"
    (arXiv 2506.22049), section 3.
    """

    name = "gpas"
    inserts = (GradientPreservingScale,)

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def obstacle(self, branch: Branch, around: Surroundings) -> str:
        if branch.order == "post":
            return "a norm follows the sum, which takes every scale out"
        if around.writes.into(branch.addition):
            return "the sum is written in place"
        behind = [around.writers.uses.layer(user) for user in branch.addition.users]
        return "it is there already" if any(isinstance(layer, GradientPreservingScale) for layer in behind) else ""

    def place(self, branch: Branch, around: Surroundings, context: Context) -> None:
        value = tensor_value(branch.addition)
        assert value is not None
        like = next(around.program.module.parameters(), value)
        gate = torch.zeros(1, dtype=value.dtype, device=like.device)
        insert_behind(context.edit, branch.addition, "gpas", GradientPreservingScale(gate))
