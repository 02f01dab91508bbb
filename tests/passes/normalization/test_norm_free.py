"""norm-free: the models the kit tries it on, what is left of norms by hand, and ReLU in place of GELU."""

from __future__ import annotations

import torch
from torch import nn

from rewrite import apply
from tests.passes.normalization.test_layerscale import DIM, Block
from tests.passes.table import Row

ROWS = [
    Row("norm-free{activation=relu}", "EncoderLayer", 6),
    Row("norm-free", "ResidualConvolutions", 0),
]


def test_by_hand() -> None:
    model, x = nn.Sequential(Block(), nn.LayerNorm(DIM)), torch.randn(3, DIM)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    block, last = model
    assert isinstance(block, Block)
    assert isinstance(last, nn.LayerNorm)
    inner = block.up(x * block.norm.weight + block.norm.bias)

    def ended(y: torch.Tensor) -> torch.Tensor:
        return (x + block.down(y)) * last.weight + last.bias

    result = apply(model, "norm-free", args=(x,))
    torch.testing.assert_close(result.module(x), ended(nn.functional.gelu(inner)), rtol=1e-4, atol=1e-4)
    assert [step.name for step in result.history[0].steps] == ["fold-affine", "without-norms"]
    assert not list(result.module.get_submodule("0.norm").parameters())
    relu = apply(model, "norm-free{activation=relu}", args=(x,))
    torch.testing.assert_close(relu.module(x), ended(inner.relu()), rtol=1e-4, atol=1e-4)


def test_only_what_is_chosen() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM, elementwise_affine=False), nn.GELU(), nn.LayerNorm(DIM))
    result = apply(model, "norm-free{where=1}", args=(torch.randn(3, DIM),))
    assert isinstance(result.module.get_submodule("3"), nn.LayerNorm)
    assert [skip.reason for skip in result.history[0].skipped] == ["not selected by where=1"]
