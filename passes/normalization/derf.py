"""The error function (Derf) in place of normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from rewrite.analysis.calibration import ERF, Curve
from rewrite.analysis.norms import Norm
from rewrite.analysis.pointwise import PointwiseLayer, number, place_of
from rewrite.graph.layers import BiasedRMSNorm
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.pointwise import Pointwise


class DynamicErf(PointwiseLayer):
    """y = weight * erf(alpha * x + shift) + bias, element by element; alpha and shift are one trained number each."""

    alpha: nn.Parameter
    shift: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.affine(torch.erf(self.alpha * x + self.shift))


@dataclass(frozen=True)
class Derf(Pointwise):
    """Replace normalization with the error function: y = weight * erf(alpha * x + shift) + bias.

    As ``dyt``, with another function that saturates; ``shift`` starts at 0. Language models start at ``alpha=1``, and
    with Muon at 0.3 or less. ``calibrate=formula`` is alpha = sqrt(pi m)/(2 C s) and weight times sqrt(m).

    Source: Chen et al., "Stronger Normalization-Free Transformers" (2025): Derf(x) = g erf(alpha x + s) + b with alpha
    0.5 and s 0 at the start. The formula follows from the slope 2/sqrt(pi) of erf, as that of ``dyt`` does.
    """

    name = "derf"
    inserts = (DynamicErf, BiasedRMSNorm)
    method = "Derf"
    alpha: float = option(0.5, "value of the trained scalar alpha at the start", at_least=-1e4, at_most=1e4)

    def curve(self) -> Curve:
        return ERF

    def layer_for(self, norm: Norm, alpha: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> DynamicErf:
        """The layer that replaces a norm."""
        return DynamicErf(weight, bias, *place_of(norm), alpha=number(alpha, norm), shift=number(0.0, norm))

    def value(self, new: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """2/√π times the integral of e^(-t²) from 0 to u = alpha x + shift."""
        assert isinstance(new, DynamicErf)
        result: torch.Tensor = _ErrorIntegral.apply(new.alpha * x + new.shift)
        return result


class _ErrorIntegral(torch.autograd.Function):
    """erf(u) with its derivative 2/√π e^(-u²) written out."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(u)
        size: torch.Tensor = torch.special.gammainc(torch.full_like(u, 0.5), u.square())
        return size * u.sign()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        (u,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * (2 / math.sqrt(math.pi)) * torch.exp(-u.square())
