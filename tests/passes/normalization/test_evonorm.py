"""evonorm: the models the kit tries it on, both forms by hand, and each reason to leave a norm alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("evonorm", "ResidualConvolutions", {"bn0", "act0", "bn1", "act1"}, near_miss={"bn2": "something else reads it"}),
    Row("evonorm{form=s0}", "ResidualConvolutions", {"bn0", "act0", "bn1", "act1"}),
    Row("evonorm", "EncoderLayer", 0),
]


def replaced(x: Tensor, text: str) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.BatchNorm2d(4, momentum=0.25), nn.SiLU())
    nn.init.normal_(model[0].weight)  # type: ignore[arg-type]
    nn.init.normal_(model[0].bias)  # type: ignore[arg-type]
    layer = apply(model, text, args=(x,)).module.get_submodule("0")
    nn.init.normal_(layer.get_parameter("gate"))
    return model[0], layer


def test_b0_by_hand() -> None:
    x = torch.randn(2, 4, 3, 3)
    norm, layer = replaced(x, "evonorm")
    scale, shift, gate = (p[:, None, None] for p in (norm.weight, norm.bias, layer.get_parameter("gate")))  # type: ignore[index]
    batch = x.var((0, 2, 3), correction=0)
    own = (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    def expected(variance: Tensor) -> Tensor:
        return scale * x / torch.maximum((variance + 1e-5).sqrt()[:, None, None], gate * x + own) + shift

    torch.testing.assert_close(layer.train()(x), expected(batch))
    torch.testing.assert_close(layer.get_buffer("running_var"), 0.75 + 0.25 * batch)
    torch.testing.assert_close(layer.eval()(x), expected(0.75 + 0.25 * batch))


def test_s0_by_hand() -> None:
    x = torch.randn(2, 4, 3, 3)
    norm, layer = replaced(x, "evonorm{form=s0 groups=2}")
    scale, shift, gate = (p[:, None, None] for p in (norm.weight, norm.bias, layer.get_parameter("gate")))  # type: ignore[index]
    groups = x.reshape(2, 2, 2, 3, 3).var((2, 3, 4), correction=0).repeat_interleave(2, 1)[..., None, None]
    torch.testing.assert_close(layer(x), scale * x * torch.sigmoid(gate * x) / (groups + 1e-5).sqrt() + shift)
    assert not list(layer.buffers())


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.flat, self.bare = nn.BatchNorm2d(4), nn.BatchNorm1d(4), nn.BatchNorm2d(4, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu()).relu()
        return self.flat(self.bare(x).relu().mean((2, 3))).relu()


def test_what_is_left_alone() -> None:
    (record,) = apply(Odd().eval(), "evonorm", args=(torch.randn(2, 4, 3, 3),)).history
    assert not record.changed
    assert {skip.path: skip.reason for skip in record.skipped} == {
        "twice": "it is called more than once",
        "flat": "its input has no positions to take statistics of",
        "bare": "it has no running statistics",
    }
