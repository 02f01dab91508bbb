"""gpas: the models the kit tries it on, value and gradient by hand, and each reason to leave a sum alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite import apply
from rewrite.passes.normalization.gpas import GradientPreservingScale
from tests.passes.table import Row

ROWS = [
    Row("gpas", "EncoderLayer", 4),
    Row("gpas", "bert", 0, near_miss={"encoder.layer.0.attention": "a norm follows the sum, which takes every scale out"}),
]


def test_by_hand() -> None:
    layer = GradientPreservingScale(torch.tensor([0.7], dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    shrunk = 0.7 * torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(y, x - shrunk * x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x += self.down(self.up(self.norm(x)).relu())
        return x


def test_a_sum_written_in_place_is_left_alone() -> None:
    (record,) = apply(InPlace(), "gpas", args=(torch.randn(2, 8),)).history
    assert [skip.reason for skip in record.skipped] == ["the sum is written in place"]
