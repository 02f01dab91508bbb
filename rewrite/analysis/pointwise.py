"""Layers that stand in place of norms: a function with the norm's weight and bias behind it."""

from __future__ import annotations

import torch
from torch import nn

from .norms import Norm


class AffineLayer(nn.Module):
    """y = weight * f(x) + bias, for an f with trained numbers of its own.

    ``weight`` and ``bias`` have the norm's ``normalized_shape`` (or are None) and stand along the last axes of x, or
    along ``channel_axis`` 1 of a channels-first map [N, C, ...]. ``eps`` is the replaced norm's, for code that reads it.
    ``numbers`` are the trained ones of f, each by its name; None where f goes without.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        normalized_shape: tuple[int, ...],
        channel_axis: int = -1,
        eps: float | None = None,
        **numbers: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        for name, value in numbers.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.normalized_shape = normalized_shape
        self.channel_axis = channel_axis
        self.eps = eps

    def affine(self, y: torch.Tensor) -> torch.Tensor:
        """weight * y + bias."""
        if self.weight is not None:
            y = y * self._along(self.weight, y)
        if self.bias is not None:
            y = y + self._along(self.bias, y)
        return y

    def _along(self, parameter: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return parameter if self.channel_axis == -1 else parameter.reshape(-1, *[1] * (y.dim() - 2))

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, channel_axis={self.channel_axis}"


class PointwiseLayer(AffineLayer):
    """y = weight * f(x) + bias, element by element."""


Place = tuple[tuple[int, ...], int, float | None]


def place_of(norm: Norm) -> Place:
    """The shape, channel axis and eps that a layer in place of a norm takes over."""
    return norm.shape, norm.channel_axis, norm.eps


def number(value: float, norm: Norm) -> torch.Tensor:
    """One trained number of a layer in place of a norm, shape [1], in the dtype and on the device of its values."""
    return torch.full((1,), value, dtype=norm.value.dtype, device=norm.device)


def parameter(value: torch.Tensor, like: nn.Parameter | None, norm: Norm) -> nn.Parameter:
    """A parameter of the dtype of ``like``, trained if that one is; without one, as the norm's values are."""
    dtype = norm.value.dtype if like is None else like.dtype
    return nn.Parameter(value.to(norm.device, dtype), like is None or like.requires_grad)
