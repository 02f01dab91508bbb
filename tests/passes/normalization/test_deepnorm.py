"""deepnorm: the models the kit tries it on, both modes by hand, and each reason to leave a branch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite import apply
from tests.passes.normalization.test_layerscale import DIM
from tests.passes.table import Row

ROWS = [
    Row("deepnorm", "bert", 24),
    Row("deepnorm", "EncoderLayer", 0, near_miss={"layer.self_attn": "it is pre-norm"}),
]


class Post(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), norm or nn.LayerNorm(DIM, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


def test_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(4, DIM), Post(), Post()), torch.randn(5, 4)
    exact, new = (apply(model, text, args=(x,)).module for text in ("deepnorm", "deepnorm{mode=new}"))
    torch.testing.assert_close(exact(x), model(x))
    alpha = 4**0.25
    torch.testing.assert_close(exact.get_parameter("1.down.weight"), alpha * model[1].down.weight)  # type: ignore[union-attr]
    y = model[0](x)
    for block in (model[1], model[2]):
        assert isinstance(block, Post)
        y = block.norm(alpha * y + block.down(block.up(y).relu()))
    torch.testing.assert_close(new(x), y)


def test_alpha_is_an_option() -> None:
    model, x = nn.Sequential(nn.Linear(4, DIM), Post()), torch.randn(5, 4)
    layer = apply(model, "deepnorm{alpha=3 mode=new}", args=(x,)).module.get_submodule("0_alpha")
    assert torch.equal(layer(x), 3 * x)


def test_what_is_left_alone() -> None:
    one = nn.LayerNorm(DIM)
    model = nn.Sequential(nn.Linear(4, DIM), Post(nn.RMSNorm(DIM)), Post(one), Post(one))
    (record,) = apply(model, "deepnorm", args=(torch.randn(5, 4),)).history
    assert {skip.path: skip.reason for skip in record.skipped} == {
        "1": "the norm behind it, 1.norm, has no eps that can be set",
        "2": "the norm behind it, 2.norm, is called more than once",
        "3": "the norm behind it, 2.norm, is called more than once",
    }
    assert not record.changed


class InPlace(Post):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y += self.down(self.up(x).relu())
        return self.norm(y)


def test_what_is_scaled_or_written_in_place() -> None:
    x = torch.randn(5, 4)
    again = apply(nn.Sequential(nn.Linear(4, DIM), Post()), "deepnorm,deepnorm", args=(x,)).history[-1]
    assert [skip.reason for skip in again.skipped] == ["its skip is scaled already"]
    (record,) = apply(nn.Sequential(nn.Linear(4, DIM), InPlace()), "deepnorm", args=(x,)).history
    assert [skip.reason for skip in record.skipped] == ["the sum is written in place"]
