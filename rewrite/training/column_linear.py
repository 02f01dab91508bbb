"""Linear layers of which the backward keeps a part of the input: some columns, or its length along one direction.

Both operators give a copy of ``y`` = x Wᵀ + b (x W + b if ``transposed``), computed without gradient; x is [..., in].
"""

from __future__ import annotations

from typing import Any

import torch

from .estimated import copies, estimates, input_gradient, rows


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


def _keep_columns(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, columns, _, kept, places, ctx.transposed = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight, columns, kept, places)


def _columns_backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, columns, kept, places = ctx.saved_tensors
    dx = dc = None
    if ctx.needs_input_grad[0]:
        dx = input_gradient(grad, weight, ctx.transposed)
        dx = dx.index_copy(-1, places, grad @ columns.to(grad.dtype)).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        dc = (rows(grad).t() @ rows(kept).to(grad.dtype)).to(columns.dtype)
    return dx, None, dc, None, None, None, None


copies(column_linear)
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


def _along(dy: torch.Tensor, kept: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    along = dy.t() @ rows(kept).to(dy.dtype)
    return (along[:, :, None] * direction.to(dy.dtype)).flatten(1)


estimates(directed_linear, _along)
