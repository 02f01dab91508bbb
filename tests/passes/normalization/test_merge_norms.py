"""merge-norms: the models the kit tries it on, the merged weights by hand, and each reason to leave a norm alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, apply
from rewrite.analysis.running_norm import RunningNorm
from tests.captures import capture
from tests.passes.table import Row

ROWS = [
    Row("merge-norms", "EncoderLayer", 8, after="power-norm"),
    Row("merge-norms", "EncoderLayer", 0, near_miss={"layer.norm1": "step 0 of 10000"}, after="rep-batchnorm"),
    Row("merge-norms", "ResidualConvolutions", 0),
]


def trained(model: nn.Module, text: str, x: Tensor) -> Program:
    """The program after a pass, with statistics and parameters as if trained, its schedule over."""
    program = apply(model, text, args=(x,))
    with torch.no_grad():
        for tensor in [*program.module.parameters(), *program.module.buffers()]:
            tensor.add_(0.3 * torch.rand(tensor.shape)) if tensor.is_floating_point() else tensor.fill_(10)
    return program


@pytest.mark.parametrize("text", ["power-norm", "unified-norm", "rep-batchnorm{schedule=10}"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_evaluation_stays_and_the_norm_is_gone(text: str, norm: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), norm(4, eps=1e-5), nn.Linear(4, 5)), torch.randn(6, 3)
    before = trained(model, text, x)
    after = apply(before, "merge-norms")
    assert not [layer for _, layer in after.layers() if isinstance(layer, RunningNorm)]
    assert sorted(after.module.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    torch.testing.assert_close(after.module.eval()(x), before.module.eval()(x))
    assert after.history[-1].warnings == ("1 norms no longer take statistics in training: fold a model that is trained",)


def test_the_weights_by_hand() -> None:
    model, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5)), torch.randn(6, 4)
    before = trained(model, "rep-batchnorm{schedule=10}", x)
    norm: Any = before.module.get_submodule("0")
    after = apply(before, "merge-norms").module
    scale = norm.batch_weight / (norm.running_var + norm.eps).sqrt()
    old = before.module.get_submodule("1")
    torch.testing.assert_close(after.get_parameter("1.weight"), old.weight * (scale + norm.alpha))
    shift = norm.batch_bias - scale * norm.running_mean
    torch.testing.assert_close(after.get_parameter("1.bias"), old.bias + old.weight @ shift)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.read, self.bare = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(self.twice(x)) + self.one(self.twice(x + 1))
        return self.read(y).relu() + self.two(self.bare(y))


def test_what_is_left_alone() -> None:
    program = apply(capture(Twice(), (torch.randn(6, 4),)), "unified-norm,merge-norms")
    record = program.history[-1]
    assert not record.changed
    reasons = {skip.path: skip.reason for skip in record.skipped}
    assert reasons["twice"] == "it is called more than once"
    assert "which is no linear layer" in reasons["read"]
    assert reasons["bare"] == "two, which reads it, has no bias to take its own"
