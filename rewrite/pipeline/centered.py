"""Layers that take the mean out of what they give at every call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.axes.layers import keeps_size
from rewrite.graph.layers import TransposedLinear


class Center(nn.Module):
    """y = x - mean(x) along ``axis``."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(self.axis, keepdim=True)


def _centered(tensor: torch.Tensor, axis: int = 0) -> torch.Tensor:
    return tensor - tensor.mean(axis, keepdim=True)


class CenteredLinear(nn.Linear):
    """y = x (W - mean of its rows)ᵀ + b - mean b: the mean of y is 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _centered(self.weight), None if self.bias is None else _centered(self.bias))


class CenteredTransposedLinear(TransposedLinear):
    """y = x (W - mean of its columns) + b - mean b: the mean of y is 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ _centered(self.weight, 1)
        return y if self.bias is None else y + _centered(self.bias)


class CenteredEmbedding(nn.Embedding):
    """y = E[i] - mean E[i]."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _centered(super().forward(ids), -1)


class CenteredConv2d(nn.Conv2d):
    """The convolution with the mean over output channels taken out of weight and bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else _centered(self.bias)
        found: torch.Tensor = self._conv_forward(x, _centered(self.weight), bias)
        return found


class CenteredDropout(nn.Dropout):
    """Dropout, and the mean over the last axis taken out of what is left."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _centered(super().forward(x), -1)


CENTERED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CenteredLinear,
    TransposedLinear: CenteredTransposedLinear,
    nn.Embedding: CenteredEmbedding,
    nn.Conv2d: CenteredConv2d,
    nn.Dropout: CenteredDropout,
}
"""The layer that does so for each kind of layer."""
_MEAN = "the mean over it is taken out (centering=bake takes it out of the weight)"
keeps_size(0, _MEAN, CenteredLinear, CenteredConv2d)
keeps_size(1, _MEAN, CenteredTransposedLinear, CenteredEmbedding)
