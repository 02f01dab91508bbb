"""power-norm: the models the kit tries it on, values and approximate gradient by hand, the start on data."""

from __future__ import annotations

import torch
from torch import nn

from rewrite import apply
from rewrite.passes.normalization.power_norm import PowerNorm
from tests.passes.normalization.test_dyt import sequences
from tests.passes.table import Row

ROWS = [
    Row("power-norm", "EncoderLayer", {"layer.norm1", "layer.norm2"}, data=sequences),
    Row("power-norm", "ChannelsFirstNorms", 0, near_miss={"norm": "its channels are not the last axis alone"}),
]


def test_three_steps_by_the_papers_formula() -> None:
    torch.manual_seed(0)
    layer = PowerNorm(nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4)), torch.rand(4) + 0.5, 1e-5, 0.3).double()
    psi, nu = layer.square.clone(), torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(2, 3, 4, dtype=torch.float64)
        y = layer(x)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        scale = (psi + 1e-5).sqrt()
        u, incoming = x.detach() / scale, weights * layer.weight.detach()
        torch.testing.assert_close(y, u * layer.weight + layer.bias)
        torch.testing.assert_close(gradient, (incoming - nu * u) / scale)
        nu = nu * (1 - 0.3 * (u * u).mean((0, 1))) + 0.3 * (incoming * u).mean((0, 1))
        psi = psi + 0.3 * (x.detach().square().mean((0, 1)) - psi)
        torch.testing.assert_close(layer.control, nu)
        torch.testing.assert_close(layer.square, psi)
    torch.testing.assert_close(layer.eval()(x), x / (psi + 1e-5).sqrt() * layer.weight + layer.bias)


def test_it_starts_at_what_the_norm_is_given() -> None:
    model, data = nn.Sequential(nn.LayerNorm(4)), [torch.randn(5, 4) + 1 for _ in range(3)]
    layer = apply(model, "power-norm", args=(data[0],), data=data).module.get_submodule("0")
    torch.testing.assert_close(layer.get_buffer("square"), torch.cat(data).square().mean(0))
    assert torch.equal(apply(model, "power-norm", args=(data[0],)).module.get_buffer("0.square"), torch.ones(4))
