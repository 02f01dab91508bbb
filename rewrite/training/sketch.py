"""Random sketches S [k, n] with E[Sᵀ S] = k I: from S X and S dY the product dYᵀ X is estimated without bias.

gaussian: normal numbers. rademacher: 1 or -1. rows: √n times k different rows of the identity. dct: √n times k different
rows of the orthonormal discrete cosine transform C, its columns with random signs, S = √n P C D.

Source: Bershatsky et al., "Memory-Efficient Backpropagation through Large Linear Layers" (arXiv 2201.13195), section 3. For
S without replacement E[Sᵀ S] = (k / n) n I.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch

from .draws import move_on

Sketch = Literal["gaussian", "rademacher", "dct", "rows"]
SKETCHES = get_args(Sketch)
_PARTS = 10_000


def height(count: int, ratio: float) -> int:
    """k for n = ``count``: ratio · n, rounded up; n may be a dynamic size."""
    return (count * max(1, round(ratio * _PARTS)) + _PARTS - 1) // _PARTS


@torch.library.custom_op("rewrite::sketch_matrix", mutates_args=())
def sketch_matrix(seed: torch.Tensor, like: torch.Tensor, count: int, sketch: str) -> torch.Tensor:
    """S [k, n], float32, on the device of ``like``, which has k rows; the same for the same seed."""
    generator = torch.Generator().manual_seed(int(seed))
    return matrix(generator, like.shape[0], count, sketch).to(like.device)


@sketch_matrix.register_fake
def _(seed: torch.Tensor, like: torch.Tensor, count: int, sketch: str) -> torch.Tensor:
    return like.new_empty((like.shape[0], count), dtype=torch.float32)


def matrix(generator: torch.Generator, rows: int, count: int, sketch: str) -> torch.Tensor:
    """A draw of S [rows, count], float32."""
    if sketch == "gaussian":
        return torch.randn(rows, count, generator=generator)
    if sketch == "rademacher":
        return 2.0 * torch.randint(2, (rows, count), generator=generator) - 1.0
    chosen = torch.randperm(count, generator=generator)[:rows]
    if sketch == "rows":
        return torch.nn.functional.one_hot(chosen, count) * math.sqrt(count)
    signs = 2.0 * torch.randint(2, (count,), generator=generator) - 1.0
    angle = math.pi / count * chosen.double()[:, None] * (torch.arange(count).double() + 0.5)
    first = torch.where(chosen == 0, math.sqrt(0.5), 1.0)[:, None]
    return (math.sqrt(2.0) * first * angle.cos() * signs).float()


@torch.library.custom_op("rewrite::sketched", mutates_args=())
def sketched(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    kept: torch.Tensor,
    seed: torch.Tensor,
    sketch: str,
    transposed: bool,
) -> torch.Tensor:
    """A copy of ``y`` = x Wᵀ + b (x W + b if ``transposed``); dW is estimated from ``kept`` = S x, the rest is exact.

    dx = dy W, db = Σ dy, dW = (S dy)ᵀ (S x) / k. x, y and dy are [..., in] and [..., out], taken as matrices of n rows.
    """
    return y.clone()


@sketched.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    kept: torch.Tensor,
    seed: torch.Tensor,
    sketch: str,
    transposed: bool,
) -> torch.Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("rewrite::moved_on", mutates_args=())
def moved_on(grad: torch.Tensor) -> torch.Tensor:
    """A copy; torch's generator is moved on by one draw, so that the next step has another seed."""
    move_on()
    return grad.clone()


@moved_on.register_fake
def _(grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, _, kept, seed, ctx.sketch, ctx.transposed = inputs
    ctx.dtype, ctx.has_bias = x.dtype, bias is not None
    ctx.save_for_backward(weight, kept, seed)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, kept, seed = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    used = weight.to(grad.dtype)
    dx = (grad @ (used.t() if ctx.transposed else used)).to(ctx.dtype) if wants_x else None
    rows = grad.reshape(-1, grad.shape[-1])
    dw = None
    if wants_weight:
        s = sketch_matrix(seed, kept, rows.shape[0], ctx.sketch).to(grad.dtype)
        dw = ((s @ rows).t() @ kept.to(grad.dtype)) / kept.shape[0]
        dw = (dw.t() if ctx.transposed else dw).to(weight.dtype)
    db = rows.sum(0) if ctx.has_bias and wants_bias else None
    return dx, dw, db, None, None, None, None, None


sketched.register_autograd(_backward, setup_context=_keep)
