"""defer-norm: the models the kit tries it on, its layer by hand, and each reason to refuse or to leave a norm alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("defer-norm", "llama", 18, near_miss={"norm": "it has a weight of its own"}, after="fold-affine"),
    Row("defer-norm", "EncoderLayer", 0, near_miss={"layer.norm1": "a LayerNorm takes a mean out"}),
]
DIM = 8


def plain(eps: float | None = 0.1) -> nn.RMSNorm:
    return nn.RMSNorm(DIM, eps=eps, elementwise_affine=False)


def test_by_hand() -> None:
    model, x = nn.Sequential(plain(), nn.Linear(DIM, 3)), torch.randn(4, DIM)
    result = apply(model, "defer-norm", args=(x,))
    layer = result.module.get_submodule("1")
    expected = x @ model[1].weight.t() / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() + model[1].bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(result.module(x), model(x))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.eps, self.heads, self.read = plain(), plain(None), plain(), plain()
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.twice(x)) + self.one(self.twice(x + 1))
        x = x + self.two(self.eps(x))
        y = self.heads(x)
        return self.read(self.attention(y, y, y, need_weights=False)[0]).relu()


def test_what_is_left_alone() -> None:
    (record,) = apply(Odd(), "defer-norm", args=(torch.randn(2, 5, DIM),)).history
    assert not record.changed
    reasons = {skip.path: skip.reason for skip in record.skipped}
    assert reasons["twice"] == "it is called more than once"
    assert reasons["eps"] == "it has no eps of its own"
    assert reasons["heads"] == "attention reads it by parameters of its own, no layer"
    assert "which is no linear layer" in reasons["read"]
