"""Dynamic tanh (DyT) in place of normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rewrite.analysis.calibration import TANH, Curve
from rewrite.analysis.norms import Norm
from rewrite.analysis.pointwise import PointwiseLayer, number, place_of
from rewrite.graph.layers import BiasedRMSNorm
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.pointwise import Pointwise


class DynamicTanh(PointwiseLayer):
    """y = weight * tanh(alpha * x) + bias, element by element; alpha is one trained number.

    As of every layer here, ``weight`` and ``bias`` are the norm's, or None.
    """

    alpha: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.affine(torch.tanh(self.alpha * x))


@dataclass(frozen=True)
class DyT(Pointwise):
    """Replace normalization with dynamic tanh: y = weight * tanh(alpha * x) + bias.

    Every LayerNorm and RMSNorm that ``where`` selects, whatever its spelling, becomes an element-wise function: no
    statistics are taken. The trained weight and bias are carried over; a norm without them gets none. The result is
    another function and has to be trained. It is known not to train in post-norm models, and not in place of BatchNorm.

    With data, ``calibrate=lsq`` takes alpha, weight and bias from a least-squares fit to what each norm gives on it (alpha
    of a grid, the others by regression for each channel), ``calibrate=formula`` alpha = sqrt(m)/(C s) and weight times
    sqrt(m), with s the harmonic mean of the tokens' deviations and m = C - 1 (RMSNorm: C). The report has the relative
    error of each place; where it stays above ``fallback``, the norm becomes an RMSNorm.

    Source: Zhu et al., "Transformers without Normalization", CVPR 2025 (arXiv 2503.10622), equation 1. There alpha
    starts at 0.5; for Llama 7B at 0.8 before attention and 0.2 before FFNs and the head: ``alpha_attention=0.8
    alpha=0.2``. The formula: Stollenwerk, "The Mathematical Relationship Between Layer Normalization and Dynamic Activation
    Functions" (arXiv 2503.21708), from the norm of one coordinate with the others fixed.
    """

    name = "dyt"
    inserts = (DynamicTanh, BiasedRMSNorm)
    method = "DyT"
    alpha: float = option(0.5, "value of the trained scalar alpha at the start", at_least=-1e4, at_most=1e4)

    def curve(self) -> Curve:
        return TANH

    def layer_for(self, norm: Norm, alpha: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> DynamicTanh:
        """The layer that replaces a norm."""
        return DynamicTanh(weight, bias, *place_of(norm), alpha=number(alpha, norm))

    def value(self, new: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """(1 - e^(-2u)) / (1 + e^(-2u)) with u = alpha x, odd in u."""
        assert isinstance(new, DynamicTanh)
        u = new.alpha * x
        return torch.where(u >= 0, _tanh_from_zero(u), -_tanh_from_zero(-u))


def _tanh_from_zero(u: torch.Tensor) -> torch.Tensor:
    """(1 - e^(-2u)) / (1 + e^(-2u)) for u >= 0, to full precision for the smallest u and without overflow.

    Its derivative at 0 is 1; that of ``clamp`` at its bound is 1 or 0, as torch's version has it.
    """
    less = torch.expm1(-2 * torch.where(u >= 0, u, 0))
    return -less / (less + 2)
