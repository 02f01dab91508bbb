"""An operator whose gradient is that of a normalization, from its result alone: what it was given is not kept.

It is opaque to Inductor, as ``stepped`` is.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("rewrite::normalized", mutates_args=())
def normalized(x: torch.Tensor, y: torch.Tensor, dims: int, eps: float, centered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``y`` = n(x), and r = 1 / √(variance + eps), or 1 / √(mean x² + eps), over the last ``dims`` axes.

    dx = r (dy - mean(dy) - y mean(y dy)), without the mean of dy where it is not ``centered``. r is float32 (float64 for
    such x), of size 1 along these axes. Under autocast it takes x and y in whatever dtype they come.
    """
    axes = list(range(-dims, 0))
    wide = x.to(wide_of(x.dtype))
    square = wide.var(axes, unbiased=False, keepdim=True) if centered else wide.square().mean(axes, keepdim=True)
    return y.clone(), torch.rsqrt(square + eps)


@normalized.register_fake
def _(x: torch.Tensor, y: torch.Tensor, dims: int, eps: float, centered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(y), x.new_empty((*x.shape[:-dims], *(1,) * dims), dtype=wide_of(x.dtype))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, ctx.dims, _, ctx.centered = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*output)


def _backward(ctx: Any, grad: torch.Tensor, grad_scale: torch.Tensor) -> Any:
    """In plain operators of y and r, so that it can be differentiated; r depends on x by dr = -r² y dx / n."""
    y, scale = ctx.saved_tensors
    axes = list(range(-ctx.dims, 0))
    wide, given = y.to(scale.dtype), grad.to(scale.dtype)
    inner = given - wide * (wide * given).mean(axes, keepdim=True)
    if ctx.centered:
        inner = inner - given.mean(axes, keepdim=True)
    count = y.shape[-ctx.dims :].numel()
    found = scale * inner - scale.square() * wide * grad_scale / count
    return found.to(ctx.dtype), None, None, None, None


normalized.register_autograd(_backward, setup_context=_keep)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32
