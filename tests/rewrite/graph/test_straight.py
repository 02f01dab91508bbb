"""A run of operators as plain values: what it takes, that it computes the same, and what a file cannot make of it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError
from rewrite.graph.straight import Straight, operator_of
from tests.captures import capture, shared


def spelled() -> nn.Module:
    return next(layer for _, layer in shared("gpt2").layers() if type(layer).__name__ == "SpelledActivation")


def test_it_computes_what_the_graph_does_and_can_be_pickled() -> None:
    layer = spelled()
    straight = Straight.of(layer.graphs["any"])
    again = pickle.loads(pickle.dumps(straight))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 5, dtype=dtype)
        assert torch.equal(layer(x), straight(x))
        assert torch.equal(layer(x), again(x))


class Odd(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.exp() + y


class Early(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y + 1


@pytest.mark.parametrize(("model", "count"), [(Odd(), 2), (Early(), 1)])
def test_what_is_no_straight_run_is_refused(model: nn.Module, count: int) -> None:
    program = capture(model, tuple(torch.randn(3, 2) for _ in range(count)))
    with pytest.raises(RewriteError):
        Straight.of(program.graph)


@pytest.mark.parametrize("name", ["add_.Tensor", "from_file.default", "nothing.default", "relu", "os.system", ""])
def test_only_operators_on_tensors_that_write_nothing_can_be_named(name: str) -> None:
    with pytest.raises(RewriteError, match="is no operator on a tensor that writes nothing"):
        operator_of(name)
