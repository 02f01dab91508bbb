"""Convolutions whose weight is standardized at every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewrite.analysis.sites import Site, sites
from rewrite.axes.layers import keeps_size
from rewrite.graph.like import like
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.replacing import Replacing

if TYPE_CHECKING:
    from rewrite.graph.program import Program


class _Standardized(nn.Module):
    """A convolution with (W - mean W) / √(var W + weight_eps) for its weight, over all that one output channel reads."""

    weight_eps: float

    def standardized(self) -> torch.Tensor:
        """The weight that counts."""
        weight: Any = self.weight
        axes = tuple(range(1, weight.dim()))
        variance, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
        found: torch.Tensor = (weight - mean) * (variance + self.weight_eps).rsqrt()
        return found


class StandardizedConv1d(_Standardized, nn.Conv1d):
    """y = conv(x, W standardized) + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(x, self.standardized(), self.bias)
        return found


class StandardizedConv2d(_Standardized, nn.Conv2d):
    """y = conv(x, W standardized) + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(x, self.standardized(), self.bias)
        return found


class StandardizedConv3d(_Standardized, nn.Conv3d):
    """y = conv(x, W standardized) + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(x, self.standardized(), self.bias)
        return found


_KINDS: Mapping[type[nn.Module], Any] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
}

keeps_size(1, "the weight is standardized over all that it reads", *_KINDS.values())


@dataclass(frozen=True)
class WeightStandardization(Replacing):
    """Standardize the weights of convolutions at every call: W becomes (W - mean W) / √(var W + eps), per output channel.

    Mean and variance are taken over all inputs that an output channel reads: its input channels and the kernel. The weight
    that is trained stays what it is, and the gradient goes through the standardization. The result is another function,
    meant for convolutions with a norm behind them, which takes the lost scale back.

    Left alone, with the reason: layers that are no plain convolution any more, and those that read a single number.

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization"
    (arXiv 1903.10520), section 3.
    """

    name = "weight-standardization"
    inserts = tuple(_KINDS.values())
    absence = "no layer of it is a plain convolution"
    eps: float = option(1e-5, "what is added to the variance", above=0, finite=True)

    def places(self, program: Program) -> Sequence[Site]:
        return [site for site in sites(program, *_KINDS) if type(site.layer) not in _KINDS.values()]

    def obstacle(self, place: Site, program: Program) -> str:
        if type(place.layer) not in _KINDS:
            return f"it is a {type(place.layer).__name__}, no plain convolution"
        single = place.layer.weight[0].numel() == 1
        return "each output channel reads a single number, which has no variance" if single else ""

    def layer_for(self, place: Site) -> nn.Module:
        made: nn.Module = like(place.layer, _KINDS[type(place.layer)], weight_eps=self.eps)
        return made

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The convolution with each row of W standardized: mean μ, and √(mean W² - μ² + eps), in the paper's words."""
        assert isinstance(new, _Standardized)
        layer: Any = new
        rows = layer.weight.flatten(1)
        mean = rows.sum(1, keepdim=True) / rows.shape[1]
        away = rows - mean
        deviation = (away.pow(2).sum(1, keepdim=True) / rows.shape[1] + new.weight_eps) ** 0.5
        found: torch.Tensor = layer._conv_forward(inputs[0], (away / deviation).reshape(layer.weight.shape), layer.bias)
        return found
