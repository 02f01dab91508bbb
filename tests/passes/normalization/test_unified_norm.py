"""unified-norm: the models the kit tries it on, and its window, outliers and gradient by hand."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.passes.normalization.unified_norm import UnifiedNorm
from tests.passes.table import Row

ROWS = [
    Row("unified-norm", "EncoderLayer", {"layer.norm1", "layer.norm2"}),
    Row("unified-norm", "ChannelsFirstNorms", 0, near_miss={"norm": "its channels are not the last axis alone"}),
]


def test_steps_by_hand() -> None:
    torch.manual_seed(0)
    layer = UnifiedNorm(nn.Parameter(torch.randn(4)), None, torch.ones(4), 1e-5, 2, 0.5, 0.5).double()
    squares, controls, running = [], [], torch.ones(4, dtype=torch.float64)
    for factor in (1.0, 1.2, 0.9, 20.0):
        x = (factor * torch.randn(5, 4, dtype=torch.float64)).requires_grad_()
        weights = torch.randn(5, 4, dtype=torch.float64)
        y = layer(x)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        squares = [*squares, x.detach().square().mean(0)][-2:]
        window = torch.stack(squares)
        geometric = (window + 1e-5).log().mean(0).exp()
        q = torch.where(window.mean(0) > 1.5 * geometric, squares[-1], geometric - 1e-5)
        u, incoming = x.detach() / (q + 1e-5).sqrt(), weights * layer.weight.detach()
        controls = [*controls, (incoming * u).mean(0)][-2:]
        running = 0.5 * (running + q)
        torch.testing.assert_close(y, u * layer.weight)
        torch.testing.assert_close(gradient, (incoming - torch.stack(controls).mean(0) * u) / (q + 1e-5).sqrt())
        torch.testing.assert_close(layer.square, running)
    assert torch.equal(q, squares[-1])  # the last step is an outlier in every channel
    torch.testing.assert_close(layer.eval()(x), x / (running + 1e-5).sqrt() * layer.weight)
