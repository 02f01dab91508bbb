"""The element-wise layer norm (ELN) in place of normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from rewrite.analysis.calibration import ROOT, Curve, Fit
from rewrite.analysis.norms import Norm
from rewrite.analysis.pointwise import PointwiseLayer, number, place_of
from rewrite.graph.layers import BiasedRMSNorm
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.pointwise import Pointwise

Form = Literal["layer", "rms"]


class ElementwiseNorm(PointwiseLayer):
    """y = weight * top * z / √(beta + z²) + bias with z = x - center, element by element; ``center`` is None for ``rms``.

    beta and center are one trained number each. ``top`` is √(C - 1), or √C for ``rms``: what |y| is bounded by.
    """

    beta: nn.Parameter
    center: nn.Parameter | None

    @property
    def top(self) -> float:
        return math.sqrt(max(math.prod(self.normalized_shape) - (self.center is not None), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x if self.center is None else x - self.center
        return self.affine(self.top * z / (self.beta + z.square()).sqrt())


@dataclass(frozen=True)
class ELN(Pointwise):
    """Replace normalization with the element-wise layer norm: y = weight * sqrt(C - 1) z / sqrt(beta + z^2) + bias.

    z = x - center, and C is the number of channels: with the other coordinates fixed this is exactly the LayerNorm of one,
    where beta = C s^2 and center are theirs (deviation s, mean). ``form=rms`` is that of RMSNorm: sqrt(C) x / sqrt(beta +
    x^2). beta starts at C / alpha^2, so alpha is 1 over the deviation that the tokens are taken to have; center at 0.

    With data, as ``dyt``: ``calibrate=lsq`` fits beta (of a grid), weight and bias, ``calibrate=formula`` is beta = C s^2
    with s the harmonic mean of the tokens' deviations.

    Source: Stollenwerk, "The Mathematical Relationship Between Layer Normalization and Dynamic Activation Functions"
    (arXiv 2503.21708).
    """

    name = "eln"
    inserts = (ElementwiseNorm, BiasedRMSNorm)
    method = "ELN"
    alpha: float = option(1.0, "1 over the deviation of the tokens at the start", above=0, at_most=1e4)
    form: Form = option("layer", "layer: sqrt(C - 1) and a center; rms: sqrt(C) without")

    def curve(self) -> Curve:
        return ROOT

    def layer_for(self, norm: Norm, alpha: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> ElementwiseNorm:
        """The layer that replaces a norm."""
        return self._layer(norm, math.prod(norm.shape) / alpha**2, weight, bias)

    def fitted_layer(self, norm: Norm, fit: Fit, weight: nn.Parameter, bias: nn.Parameter | None) -> ElementwiseNorm:
        """The layer with beta = 1 / scale²; the fit's weight has what the layer multiplies by itself."""
        made = self._layer(norm, fit.scale**-2, None, bias)
        made.weight = nn.Parameter(weight.detach() / made.top, weight.requires_grad)
        return made

    def _layer(self, norm: Norm, beta: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> ElementwiseNorm:
        center = number(0.0, norm) if self.form == "layer" else None
        return ElementwiseNorm(weight, bias, *place_of(norm), beta=number(beta, norm), center=center)

    def value(self, new: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """√(C - 1) or √C times the sine of the angle whose tangent is z / √beta."""
        assert isinstance(new, ElementwiseNorm)
        z = x if new.center is None else x - new.center
        top = math.sqrt(math.prod(new.normalized_shape) - (new.center is not None) or 1)
        return top * torch.sin(torch.atan(z / new.beta.sqrt()))
