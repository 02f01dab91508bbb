"""Exact arithmetic: float64 throughout, and gradients that are those of the formula."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.numerics.exact import ExactArithmetic


def test_what_casts_to_float32_is_float64() -> None:
    x = torch.randn(3, dtype=torch.float64)
    with ExactArithmetic():
        assert torch.equal(x.float() + 0, x)


def test_batchnorm_of_one_example_with_strides_of_no_memory_format() -> None:
    """What a transposed sequence gives as an image: torch's own backward pairs the wrong elements there."""
    norm = nn.BatchNorm2d(6).double().eval()
    with torch.no_grad():
        norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(1, 25, 6, dtype=torch.float64).transpose(1, 2).reshape(1, 6, 5, 5).requires_grad_()
    assert x.stride() == (6, 1, 30, 6)
    gradient = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    with ExactArithmetic():
        (found,) = torch.autograd.grad(norm(x), x, gradient)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(found, gradient * scale.detach().reshape(-1, 1, 1), rtol=0, atol=1e-14)
