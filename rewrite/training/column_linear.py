"""Linear layers of which the backward keeps a part of the input: some columns, or its length along one direction.

Both operators give a copy of ``y`` = x Wᵀ + b (x W + b if ``transposed``), computed without gradient; x is [..., in].
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("rewrite::column_linear", mutates_args=())
def column_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    y: torch.Tensor,
    kept: torch.Tensor,
    places: torch.Tensor,
    transposed: bool,
) -> torch.Tensor:
    """Of the weight the ``columns`` [out, r] at the inputs ``places`` train: their gradient is dyᵀ x[..., places] (kept).

    dx = dy W with these columns in place of the frozen ``weight``'s own.
    """
    return y.clone()


@column_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    y: torch.Tensor,
    kept: torch.Tensor,
    places: torch.Tensor,
    transposed: bool,
) -> torch.Tensor:
    return torch.empty_like(y)


def _keep_columns(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, columns, _, kept, places, ctx.transposed = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight, columns, kept, places)


def _columns_backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, columns, kept, places = ctx.saved_tensors
    dx = dc = None
    if ctx.needs_input_grad[0]:
        used = weight.to(grad.dtype)
        dx = grad @ (used.t() if ctx.transposed else used)
        dx = dx.index_copy(-1, places, grad @ columns.to(grad.dtype)).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        dc = (_rows(grad).t() @ _rows(kept).to(grad.dtype)).to(columns.dtype)
    return dx, None, dc, None, None, None, None


column_linear.register_autograd(_columns_backward, setup_context=_keep_columns)


@torch.library.custom_op("rewrite::directed_linear", mutates_args=())
def directed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    kept: torch.Tensor,
    direction: torch.Tensor,
    transposed: bool,
) -> torch.Tensor:
    """dW is that of x̂ in place of x: its parts of the width m of ``direction`` v are z v, z [..., in / m] being ``kept``."""
    return y.clone()


@directed_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    kept: torch.Tensor,
    direction: torch.Tensor,
    transposed: bool,
) -> torch.Tensor:
    return torch.empty_like(y)


def _keep_direction(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, _, kept, direction, ctx.transposed = inputs
    ctx.dtype, ctx.has_bias = x.dtype, bias is not None
    ctx.save_for_backward(weight, kept, direction)


def _direction_backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, kept, direction = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        used = weight.to(grad.dtype)
        dx = (grad @ (used.t() if ctx.transposed else used)).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        along = _rows(grad).t() @ _rows(kept).to(grad.dtype)
        dw = (along[:, :, None] * direction.to(grad.dtype)).flatten(1).to(weight.dtype)
        dw = dw.t() if ctx.transposed else dw
    if ctx.has_bias and ctx.needs_input_grad[2]:
        db = _rows(grad).sum(0)
    return dx, dw, db, None, None, None, None


directed_linear.register_autograd(_direction_backward, setup_context=_keep_direction)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
