"""Exact arithmetic: run any module in float64 throughout, whatever dtypes its code names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rewrite.torch_private import TorchDispatchMode, pytree

aten = torch.ops.aten
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


class ExactArithmetic(TorchDispatchMode):
    """Turns every floating dtype argument of every operator into float64 and skips dtype assertions.

    A plain ``.double()`` is not enough: code that casts to float32 inside would round there, or fail. BatchNorm's backward
    is given contiguous tensors: on the CPU torch 2.13 pairs the wrong elements where the batch is one and the strides fit
    no memory format.
    """

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_assert_tensor_metadata" in str(func):
            return None
        args, kwargs = pytree.tree_map(_widen, (args, kwargs or {}))
        if func is aten.native_batch_norm_backward.default:
            args = [arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]
        if func is aten.full.default and isinstance(args[1], float):
            kwargs.setdefault("dtype", torch.float64)  # a number alone, such as the least of float64, is no float32 there
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value in _FLOATING:
        return torch.float64
    if isinstance(value, torch.Tensor) and value.dtype in _FLOATING and not value.requires_grad:
        return value.double()
    return value
