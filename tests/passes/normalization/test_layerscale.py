"""layerscale and rezero: the models the kit tries layerscale on, gains by hand, and each reason to leave a branch alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply
from tests.passes.table import Row

ROWS = [
    Row("layerscale", "EncoderLayer", 4),
    Row("layerscale{mode=new}", "ResidualConvolutions", 1),
    Row("layerscale", "BatchNormTwice", 0),
]
DIM = 8


class Block(nn.Module):
    """x + scale ∘ down(gelu(up(norm x))), with a scale of its own where ``scaled``, or one projection for both matrices."""

    def __init__(self, scaled: bool = False, down: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.down = nn.Linear(DIM, DIM) if down is None else down
        self.scale = nn.Parameter(torch.rand(DIM)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + (y if self.scale is None else y * self.scale)


@pytest.mark.parametrize("name", ["layerscale", "rezero"])
def test_by_hand(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, DIM), Block()), torch.randn(3, 4)
    h = model[0](x)
    new = apply(model, f"{name}{{mode=new init=0.25}}", args=(x,)).module
    torch.testing.assert_close(new(x), h + 0.25 * (model(x) - h))
    exact = apply(model, f"{name}{{init=0.25}}", args=(x,)).module
    torch.testing.assert_close(exact(x), model(x))
    torch.testing.assert_close(exact.get_parameter("1.down.weight"), 4 * model[1].down.weight)  # type: ignore[union-attr]
    assert exact.get_parameter("1.down_gain.scale").shape == ((DIM,) if name == "layerscale" else (1,))
    assert torch.equal(apply(model, name, args=(x,)).module.get_parameter("1.down.weight"), model[1].down.weight)  # type: ignore[union-attr]


def test_where_a_gain_starts() -> None:
    model, x = nn.Sequential(Block()), torch.randn(3, DIM)
    for text, value in {"rezero{mode=new}": 0.0, "rezero": 1.0, "layerscale{mode=new}": 1e-4, "layerscale": 1.0}.items():
        scale = apply(model, text, args=(x,)).module.get_parameter("0.down_gain.scale")
        assert torch.equal(scale, torch.full_like(scale, value)), text
    with pytest.raises(RewriteError, match="a gain of 0 takes all"):
        apply(model, "rezero{init=0}", args=(x,))


def skipped(model: nn.Module, text: str) -> dict[str, str]:
    (record,) = apply(model, text, args=(torch.randn(3, DIM),)).history
    return {skip.path: skip.reason for skip in record.skipped}


def test_what_is_left_alone() -> None:
    assert skipped(nn.Sequential(Block(scaled=True)), "layerscale") == {"0": "what it adds is scaled already"}
    twice = Block()
    assert skipped(nn.Sequential(twice, twice), "layerscale{init=0.5}") == {"0": "0.down is called more than once"}
    tied = Block()
    tied.down.weight = tied.up.weight
    assert skipped(nn.Sequential(tied), "rezero{init=0.5}") == {"0": "0.down.weight is read elsewhere too"}
    odd = nn.Sequential(nn.Linear(DIM, DIM), Block(down=nn.Tanh()))
    assert "which is no linear layer" in skipped(odd, "layerscale{init=0.5}")["1.up"]
