"""ScaleNorm in place of normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.analysis.norms import Norm, norms
from rewrite.analysis.pointwise import AffineLayer, number, place_of
from rewrite.pipeline.replacing import Replacing

if TYPE_CHECKING:
    from rewrite.graph.program import Program


class ScaleNorm(AffineLayer):
    """y = weight * scale · x / √(Σ x² + C eps) + bias over the C channels; scale is one trained number."""

    scale: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = (1,) if self.channel_axis != -1 else tuple(range(-len(self.normalized_shape), 0))
        floor = math.prod(self.normalized_shape) * _eps(self, x)
        return self.affine(self.scale * x * (x.square().sum(axes, keepdim=True) + floor).rsqrt())


def _eps(layer: AffineLayer, x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).eps if layer.eps is None else layer.eps


@dataclass(frozen=True)
class ScaleNormPass(Replacing):
    """Replace normalization with ScaleNorm: y = weight * g x / √(Σ x² + C eps) + bias, with one trained number g.

    g starts at √C, where C is the number of channels and eps the norm's own: so it is the function of an RMSNorm, and
    that of a LayerNorm on what has no mean (`rmsnorm` before this pass sees to that). The trained weight and bias are
    carried over; `fold-affine` before this pass moves them into the layers that read the norm, and g alone is left.

    Source: Nguyen and Salazar, "Transformers without Tears", IWSLT 2019 (arXiv 1910.05895), section 2.2:
    g x / ||x|| with g at √d at the start. eps stands there for a bound from below on ||x||.
    """

    name = "scalenorm"
    inserts = (ScaleNorm,)
    absence = "no layer of it is a LayerNorm or RMSNorm"

    def places(self, program: Program) -> Sequence[Norm]:
        return norms(program)

    def layer_for(self, place: Norm) -> ScaleNorm:
        scale = number(math.sqrt(math.prod(place.shape)), place)
        return ScaleNorm(place.weight, place.bias, *place_of(place), scale=scale)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """g u with u = x / √(‖x‖² + C eps), channels moved to the end and back."""
        assert isinstance(new, ScaleNorm)
        rows = inputs[0].movedim(new.channel_axis, -1)
        flat = rows.flatten(-len(new.normalized_shape))
        length = (torch.einsum("...c,...c->...", flat, flat) + flat.shape[-1] * _eps(new, rows)).sqrt()
        y = new.scale * (flat / length.unsqueeze(-1)).reshape(rows.shape)
        y = y if new.weight is None else y * new.weight
        y = y if new.bias is None else y + new.bias
        return y.movedim(-1, new.channel_axis)
