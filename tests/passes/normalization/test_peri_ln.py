"""peri-ln: the models the kit tries it on, norm and calibrated weight by hand, and each reason to leave a branch alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply
from tests.passes.normalization.test_dyt import sequences
from tests.passes.normalization.test_layerscale import DIM, Block
from tests.passes.table import Row

ROWS = [
    Row("peri-ln{calibrate=rms}", "EncoderLayer", 4, data=sequences),
    Row("peri-ln", "bert", 0, near_miss={"encoder.layer.0.attention": "it is post-norm, not pre-norm"}),
]


def test_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(4, DIM), Block()), torch.randn(5, 4)
    block, h = model[1], model[0](x)
    added = model(x) - h
    plain = apply(model, "peri-ln", args=(x,)).module
    torch.testing.assert_close(plain(x), h + nn.functional.layer_norm(added, (DIM,)))
    fitted = apply(model, "peri-ln{calibrate=rms}", args=(x,), data=[x])
    rms = added.square().mean().sqrt()
    torch.testing.assert_close(fitted.module(x), h + rms * nn.functional.layer_norm(added, (DIM,)))
    (measured,) = fitted.history[0].measured
    assert measured.figures["rms"] == pytest.approx(float(rms.detach()))
    assert isinstance(block, Block)


def test_it_follows_the_norm_at_the_start() -> None:
    block = Block()
    block.norm = nn.RMSNorm(DIM, eps=1e-3)  # type: ignore[assignment]
    layer = apply(nn.Sequential(block), "peri-ln", args=(torch.randn(5, DIM),)).module.get_submodule("0.down_norm")
    assert isinstance(layer, nn.RMSNorm)
    assert layer.eps == 1e-3


def test_what_is_refused_and_left_alone() -> None:
    x = torch.randn(5, DIM)
    with pytest.raises(RewriteError, match=r"peri-ln\{calibrate=rms\} needs data"):
        apply(nn.Sequential(Block()), "peri-ln{calibrate=rms}", args=(x,))
    (record,) = apply(nn.Sequential(Block(scaled=True)), "peri-ln", args=(x,)).history
    assert [skip.reason for skip in record.skipped] == ["what it adds is scaled behind it"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def test_channels_along_another_axis() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Convolutions())
    (record,) = apply(model, "peri-ln", args=(torch.randn(2, 4, 5, 5),)).history
    assert [skip.reason for skip in record.skipped] == ["its channels are not the last axis"]
