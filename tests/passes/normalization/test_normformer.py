"""normformer: the models the kit tries it on, its layers by hand, and each reason to leave a branch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite import apply
from rewrite.passes.normalization.normformer import HeadScale
from tests.passes.normalization.test_layerscale import DIM, Block
from tests.passes.table import Row

ROWS = [
    Row("normformer", "EncoderLayer", 6),
    Row("normformer", "vit", 12),
    Row("normformer", "bert", 0, near_miss={"encoder.layer.0.attention": "it is post-norm, not pre-norm"}),
]


def test_the_norm_of_the_ffn_stands_behind_its_activation() -> None:
    model, x = nn.Sequential(Block()), torch.randn(5, DIM)
    block = model[0]
    assert isinstance(block, Block)
    inner = nn.functional.layer_norm(nn.functional.gelu(block.up(block.norm(x))), (DIM,))
    torch.testing.assert_close(apply(model, "normformer", args=(x,)).module(x), x + block.down(inner))


def test_the_gain_of_a_head() -> None:
    x, scale = torch.randn(2, 3, 4, 5), torch.tensor([1.0, 2.0, -1.0])
    torch.testing.assert_close(HeadScale(scale)(x), torch.stack([x[:, 0], 2 * x[:, 1], -x[:, 2]], 1))


class TwoActivations(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu().tanh())


def test_what_is_left_alone() -> None:
    x = torch.randn(5, DIM)
    (record,) = apply(nn.Sequential(TwoActivations()), "normformer", args=(x,)).history
    assert [skip.reason for skip in record.skipped] == ["there is not one activation with channels along the last axis"]
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True, norm_first=True)
    (record,) = apply(layer, "normformer{heads=false attention=false}", args=(torch.randn(2, 5, DIM),)).history
    assert [skip.reason for skip in record.skipped] == ["there is nothing that the options ask for"]
    again = apply(nn.Sequential(Block()), "normformer,normformer", args=(x,)).history[-1]
    assert [skip.reason for skip in again.skipped] == ["it has these layers already"]


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(self.up(n).sigmoid() * self.up(n))


def test_a_gated_ffn_is_left_alone() -> None:
    (record,) = apply(nn.Sequential(Gated()), "normformer", args=(torch.randn(5, DIM),)).history
    assert [skip.reason for skip in record.skipped] == ["it is gated ffn, neither attention nor a plain FFN"]
