"""online-norm: the models the kit tries it on, two steps by hand, and each reason to leave a norm alone."""

from __future__ import annotations

import torch
from torch import nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("online-norm{decay=0.9}", "ResidualConvolutions", {"bn0", "bn1", "bn2"}),
    Row("online-norm", "BatchNormTwice", 0, near_miss={"bn": "it is called more than once"}),
]


def test_two_steps_by_hand() -> None:
    torch.manual_seed(0)
    a, b = 0.8, 0.7
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    layer = apply(model, f"online-norm{{decay={a} decay_back={b}}}", args=(x,)).module.get_submodule("0").train()
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    e_y, e_x = torch.zeros_like(mean), torch.zeros_like(mean)
    for _ in range(2):
        x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(4, 3, 5, dtype=torch.float64)
        y = layer(x)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        for t in range(4):
            sample, scale = x[t].detach(), (variance + 1e-5).sqrt()
            u = (sample - mean[:, None]) / scale[:, None]
            torch.testing.assert_close(y[t].detach(), u)
            g = weights[t] - (1 - b) * e_y[:, None] * u
            e_y = e_y + (g * u).mean(1)
            dx = g / scale[:, None] - (1 - b) * e_x[:, None]
            e_x = e_x + dx.mean(1)
            torch.testing.assert_close(gradient[t], dx)
            away = sample.mean(1) - mean
            variance = a * variance + (1 - a) * sample.var(1, correction=0) + a * (1 - a) * away**2
            mean = a * mean + (1 - a) * sample.mean(1)
        torch.testing.assert_close(layer.get_buffer("running_var"), variance)
    expected = (x - mean[:, None]) / (variance + 1e-5).sqrt()[:, None]
    torch.testing.assert_close(layer.eval()(x), expected)


def test_a_norm_without_running_statistics_is_left_alone() -> None:
    plain = nn.BatchNorm1d(3)
    plain.running_mean = plain.running_var = plain.num_batches_tracked = None
    (record,) = apply(nn.Sequential(plain, nn.BatchNorm1d(3)), "online-norm", args=(torch.randn(4, 3, 5),)).history
    assert "0" not in {site.path for site in record.changes}
