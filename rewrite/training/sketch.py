"""Random sketches S [k, n] with E[Sᵀ S] = k I: from S X and S dY the product dYᵀ X is estimated without bias.

gaussian: normal numbers. rademacher: 1 or -1. rows: √n times k different rows of the identity. dct: √n times k different
rows of the orthonormal discrete cosine transform C, its columns with random signs, S = √n P C D.

Source: Bershatsky et al., "Memory-Efficient Backpropagation through Large Linear Layers" (arXiv 2201.13195). For
rows without replacement E[Sᵀ S] = (k / n) n I.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from .draws import move_on
from .estimated import estimates

Sketch = Literal["gaussian", "rademacher", "dct", "rows"]
SKETCHES = get_args(Sketch)
_PARTS = 10_000


def height(count: int, ratio: float) -> int:
    """k for n = ``count``: ratio · n, rounded up; n may be a dynamic size."""
    return (count * max(1, round(ratio * _PARTS)) + _PARTS - 1) // _PARTS


@torch.library.custom_op("rewrite::sketch_matrix", mutates_args=())
def sketch_matrix(seed: torch.Tensor, like: torch.Tensor, rows: int, sketch: str, moves_on: bool) -> torch.Tensor:
    """S [rows, n] for the n rows of ``like``, of its dtype and on its device; the same for the same seed.

    With ``moves_on`` torch's generator draws one number: the next step has another seed.
    """
    generator = torch.Generator().manual_seed(int(seed))
    if moves_on:
        move_on()
    wide = torch.float64 if like.dtype is torch.float64 else torch.float32
    return matrix(generator, rows, like.shape[0], sketch, wide).to(like.device, like.dtype)


@sketch_matrix.register_fake
def _(seed: torch.Tensor, like: torch.Tensor, rows: int, sketch: str, moves_on: bool) -> torch.Tensor:
    return like.new_empty((rows, like.shape[0]))


def matrix(
    generator: torch.Generator, rows: int, count: int, sketch: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A draw of S [rows, count], the same in float32 and float64 up to rounding."""
    if sketch == "gaussian":
        return torch.randn(rows, count, generator=generator).to(dtype)
    if sketch == "rademacher":
        return (2 * torch.randint(2, (rows, count), generator=generator) - 1).to(dtype)
    chosen = torch.randperm(count, generator=generator)[:rows]
    if sketch == "rows":
        return torch.nn.functional.one_hot(chosen, count).to(dtype) * math.sqrt(count)
    signs = 2 * torch.randint(2, (count,), generator=generator) - 1
    turns = chosen[:, None] * (2 * torch.arange(count) + 1) % (4 * count)
    first = torch.where(chosen == 0, math.sqrt(0.5), 1.0).to(dtype)[:, None]
    return math.sqrt(2.0) * first * (math.pi / (2 * count) * turns.to(dtype)).cos() * signs


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


def _from_sketches(dy: torch.Tensor, kept: torch.Tensor, seed: torch.Tensor, sketch: str) -> torch.Tensor:
    s = sketch_matrix(seed, dy, kept.shape[0], sketch, True)
    found: torch.Tensor = ((s @ dy).t() @ kept.to(dy.dtype)) / kept.shape[0]
    return found


estimates(sketched, _from_sketches)
