"""LayerNorm and RMSNorm written out, for the references of passes that put one in."""

from __future__ import annotations

import torch
from torch import nn


def norm_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(offset + weight) · (x - mean) / √(var + eps) + bias, for an RMSNorm without mean and with mean x² for var."""
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    axis, offset = getattr(layer, "channel_axis", -1), getattr(layer, "offset", 0.0)
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    axes = tuple(range(-len(layer.normalized_shape), 0))
    y = x.movedim(axis, -1)
    y = y - y.mean(axes, keepdim=True) if isinstance(layer, nn.LayerNorm) else y
    y = y / (y.square().mean(axes, keepdim=True) + eps).sqrt()
    y = y if layer.weight is None else y * (layer.weight + offset)
    bias = getattr(layer, "bias", None)
    return (y if bias is None else y + bias).movedim(-1, axis)
