"""Attributes of layers that say a size of their tensors, so that both can be kept in agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rewrite.torch_private import _BatchNorm

from .layers import TransposedLinear

Size = Callable[[Any], object]
_LENGTH: Size = lambda layer: _first(layer).shape[0]  # noqa: E731
_SHAPE: Size = lambda layer: tuple(_first(layer).shape)  # noqa: E731
_Kinds = type[nn.Module] | tuple[type[nn.Module], ...]
_AXES: tuple[tuple[_Kinds, dict[str, Size]], ...] = (
    (nn.Linear, {"out_features": lambda m: m.weight.shape[0], "in_features": lambda m: m.weight.shape[1]}),
    (TransposedLinear, {"in_features": lambda m: m.weight.shape[0], "out_features": lambda m: m.weight.shape[1]}),
    (nn.Embedding, {"num_embeddings": lambda m: m.weight.shape[0], "embedding_dim": lambda m: m.weight.shape[1]}),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        {"in_channels": lambda m: m.weight.shape[0], "out_channels": lambda m: m.weight.shape[1] * m.groups},
    ),
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        {"out_channels": lambda m: m.weight.shape[0], "in_channels": lambda m: m.weight.shape[1] * m.groups},
    ),
    ((_BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), {"num_features": _LENGTH}),
    (nn.GroupNorm, {"num_channels": _LENGTH}),
    (nn.LayerNorm, {"normalized_shape": _SHAPE}),
    (nn.RMSNorm, {"normalized_shape": _SHAPE}),
    (nn.PReLU, {"num_parameters": _LENGTH}),
)


def followed(layer: object) -> Iterator[tuple[str, object]]:
    """The attributes of a layer that its tensors have outgrown, with what they must be."""
    sizes = next((sizes for kind, sizes in _AXES if isinstance(layer, kind)), {})
    for name, size in sizes.items():
        if _first(layer) is not None and getattr(layer, name, None) != size(layer):
            yield name, size(layer)


def _first(layer: Any) -> torch.Tensor:
    """The weight; where a norm has none, its running mean."""
    weight = layer._parameters.get("weight")
    found: torch.Tensor = weight if weight is not None else layer._buffers.get("running_mean")
    return found
