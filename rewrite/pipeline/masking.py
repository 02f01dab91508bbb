"""Layers whose weight has a mask, and masks drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.like import like


class Masked(nn.Module):
    """A layer whose weight counts where ``mask`` is True: y = layer(x) with weight ∘ mask; weight and bias keep their names.

    ``mask`` is a buffer of the weight's shape, saved with the model.
    """

    def masked(self) -> torch.Tensor:
        """weight ∘ mask."""
        found: torch.Tensor = self._parameters["weight"] * self._buffers["mask"]  # type: ignore[operator]
        return found


class MaskedLinear(Masked, nn.Linear):
    """y = x (W ∘ M)ᵀ + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.masked(), self.bias)


class MaskedTransposedLinear(Masked, TransposedLinear):
    """y = x (W ∘ M) + b, W [in_features, out_features]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.masked())


class MaskedConv1d(Masked, nn.Conv1d):
    """y = conv(x, W ∘ M) + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(x, self.masked(), self.bias)
        return found


class MaskedConv2d(Masked, nn.Conv2d):
    """y = conv(x, W ∘ M) + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(x, self.masked(), self.bias)
        return found


MASKED: Mapping[type[nn.Module], Any] = {
    nn.Linear: MaskedLinear,
    TransposedLinear: MaskedTransposedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
}
"""The masked layer for each kind of layer."""


def masked(layer: nn.Module, mask: torch.Tensor) -> nn.Module:
    """A layer with a mask, and with all else that the layer has."""
    kind: type[nn.Module] = next(made for base, made in MASKED.items() if isinstance(layer, base))
    return like(layer, kind, mask=mask)


def unmasked(layer: nn.Module) -> nn.Module:
    """A masked layer without its mask: the weight as it is."""
    kind = next(base for base, made in MASKED.items() if type(layer) is made)
    made = like(layer, kind)
    del made._buffers["mask"]
    return made


def random_mask(weight: torch.Tensor, density: float, seed: str) -> torch.Tensor:
    """A mask of a weight's shape with round(density · n) ones, at positions drawn from the text ``seed``."""
    if weight.is_meta:
        return torch.ones_like(weight, dtype=torch.bool)
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[torch.randperm(weight.numel(), generator=generator)[: round(density * weight.numel())]] = True
    return mask.reshape(weight.shape).to(weight.device)


def masked_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a masked layer gives, written out: torch's layer on the weight where the mask is True and on 0 elsewhere."""
    assert isinstance(layer, Masked)
    own: Any = layer
    weight = torch.where(own.mask, own.weight, 0)
    if isinstance(layer, MaskedLinear | MaskedTransposedLinear):
        product: torch.Tensor = x @ (weight.t() if isinstance(layer, MaskedLinear) else weight)
        return product if own.bias is None else product + own.bias
    convolve = F.conv1d if isinstance(layer, MaskedConv1d) else F.conv2d
    found: torch.Tensor = convolve(x, weight, own.bias, own.stride, own.padding, own.dilation, own.groups)
    return found
