"""norm-scaling: the models the kit tries it on, both modes by hand, and what is left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rewrite import apply
from tests.passes.normalization.test_layerscale import DIM, Block
from tests.passes.table import Row

ROWS = [
    Row("norm-scaling", "gpt2", 8),
    Row("norm-scaling", "EncoderLayer", 0),
]


def test_by_hand() -> None:
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(5, DIM)
    exact, new = (apply(model, text, args=(x,)).module for text in ("norm-scaling", "norm-scaling{mode=new}"))
    torch.testing.assert_close(exact(x), model(x))
    torch.testing.assert_close(exact.get_parameter("2.up.weight"), math.sqrt(3) * model[2].up.weight)  # type: ignore[union-attr]
    y = model[0](x)
    for i, factor in ((1, 2**-0.5), (2, 3**-0.5)):
        block = model[i]
        assert isinstance(block, Block)
        y = y + block.down(nn.functional.gelu(block.up(factor * block.norm(y))))
    torch.testing.assert_close(new(x), y)


class Read(Block):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(self.up(n).relu() * n)


def test_a_norm_that_something_else_reads_is_left_alone_where_the_function_is_kept() -> None:
    model = nn.Sequential(Block(), Read())
    (record,) = apply(model, "norm-scaling", args=(torch.randn(5, DIM),)).history
    assert not record.changed
    (skip,) = record.skipped
    assert (skip.path, "which is no linear layer" in skip.reason) == ("1.norm", True)
