"""Norms and activations that libraries spell out, as one layer that repeats the captured operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph

from .regions import Region


class SpelledNorm(Region):
    """A normalization kept as its captured operators: y = (offset + weight) · n(x) + bias.

    ``weight`` and ``bias`` stay under the names they have in the user's module (``weight_name``, ``bias_name``).
    """

    def __init__(self, graph: Graph, meaning: NormMeaning) -> None:
        super().__init__({"any": graph}, "a normalization spelled out")
        self.kind = meaning.kind
        self.eps = meaning.eps
        self.channels = meaning.channels
        self.channel_axis = meaning.channel_axis
        self.offset = meaning.offset
        self.weight_name = meaning.weight
        self.bias_name = meaning.bias

    def gain(self) -> nn.Parameter | None:
        """The factor of each channel, shape [channels]: the weight itself, or a new parameter where 1 is added to it."""
        weight = self._parameters[self.weight_name] if self.weight_name is not None else None
        if weight is None or (self.offset == 0.0 and weight.dim() == 1):
            return weight
        return nn.Parameter((weight.detach() + self.offset).reshape(-1), weight.requires_grad)

    def shift(self) -> nn.Parameter | None:
        """The bias of each channel, shape [channels]."""
        bias = self._parameters[self.bias_name] if self.bias_name is not None else None
        return bias if bias is None or bias.dim() == 1 else nn.Parameter(bias.detach().reshape(-1), bias.requires_grad)

    def extra_repr(self) -> str:
        return f"{self.kind}, channels={self.channels}, eps={self.eps}, offset={self.offset}"


class SpelledActivation(Region):
    """An activation function kept as its captured operators; ``function`` names the formula."""

    def __init__(self, graph: Graph, function: str) -> None:
        super().__init__({"any": graph}, "an activation spelled out")
        self.function = function

    def extra_repr(self) -> str:
        return self.function


@dataclass(frozen=True)
class NormMeaning:
    """What a group of operators was found to compute; see ``SpelledNorm``."""

    kind: Any
    channels: int
    channel_axis: int
    eps: float
    offset: float
    weight: str | None
    bias: str | None
