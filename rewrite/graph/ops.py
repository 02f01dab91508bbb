"""Functions that stand in layer graphs beside ATen operators: what a literal of the capture follows at run time."""

from __future__ import annotations

import torch

_LIMITS = ("min", "max", "eps", "tiny", "smallest_normal", "resolution")


def device_of(tensor: torch.Tensor) -> torch.device:
    """The device of ``tensor``: stands where a capture baked a device literal."""
    return tensor.device


def dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of ``tensor``: stands where a capture baked a dtype that follows the model's."""
    return tensor.dtype


def dtype_limit(tensor: torch.Tensor, name: str) -> float:
    """``torch.finfo(tensor.dtype).<name>``: stands where a capture baked such a number, as attention masks do."""
    return float(getattr(torch.finfo(tensor.dtype), name))


FOLLOWING = (device_of, dtype_of, dtype_limit)
"""All of them."""


def limit_name(value: float, dtype: torch.dtype) -> str | None:
    """Which limit of ``dtype`` the number ``value`` is: ``min``, ``tiny``, ..., or None."""
    info = torch.finfo(dtype)
    for name in _LIMITS:
        if value == getattr(info, name):
            return name
    return None
