"""Norms by running statistics: in evaluation one multiplication and one addition a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RunningNorm(nn.Module):
    """y = gain ∘ x + shift over the last axis in evaluation, with vectors that follow from the tensors ``sources()`` names.

    ``weight`` [C] is the norm's, ``bias`` [C] or None too, ``eps`` likewise. A method says ``affine_map``, and what it does
    in training.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    eps: float

    def sources(self) -> tuple[str, ...]:
        """The names of the tensors that the map follows from, in the order in which ``affine_map`` takes them."""
        raise NotImplementedError

    @staticmethod
    def affine_map(eps: float, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gain and shift (None where there is none) from eps and the sources."""
        raise NotImplementedError

    def unsettled(self) -> str:
        """Why the map of this moment is not what evaluation computes; empty if it is."""
        return ""

    def evaluated(self, x: torch.Tensor) -> torch.Tensor:
        """gain ∘ x + shift."""
        tensors: list[Any] = [getattr(self, name) for name in self.sources()]
        gain, shift = self.affine_map(self.eps, *tensors)
        return x * gain if shift is None else x * gain + shift


class RunningSquareNorm(RunningNorm):
    """y = weight ∘ x / √(square + eps) + bias in evaluation, with ``square`` [C] a running mean of x²."""

    square: torch.Tensor

    def sources(self) -> tuple[str, ...]:
        return ("weight", "square") if self.bias is None else ("weight", "square", "bias")

    @staticmethod
    def affine_map(eps: float, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, square, *bias = tensors
        return weight * (square + eps).rsqrt(), bias[0] if bias else None


def rows(x: torch.Tensor) -> torch.Tensor:
    """A value as a matrix [tokens, channels]."""
    return x.reshape(-1, x.shape[-1])
