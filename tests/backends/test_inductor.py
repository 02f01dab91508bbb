"""The TorchInductor lowering: one graph, compiled for all sizes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import rewrite
from tests.backends.models import Transformer, error, mlp, tokens, transformer
from tests.captures import capture

# measured: 2e-7 to 5e-7 on these and on the development models, relative to the largest value of an output
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _forget_what_is_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_a_perceptron_is_compiled_once_for_every_batch() -> None:
    program = mlp()
    run, eager = rewrite.lower(program, "inductor"), rewrite.lower(program)
    for batch in (4, 3, 7):
        x = torch.randn(batch, 8)
        found = run(x)
        assert error(eager(x), found) < TOLERANCE
        assert not found.requires_grad
    assert counters["stats"]["unique_graphs"] == 1
    assert program.module.training


def test_a_transformer_is_compiled_once_for_every_batch_and_length() -> None:
    program = transformer()
    assert program.module.interface.conditions
    run, eager = rewrite.lower(program, "inductor"), rewrite.lower(program)
    for batch, length in ((2, 6), (3, 9)):
        inputs = tokens(batch, length)
        assert error(eager(*inputs), run(*inputs)) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_converted_transformer() -> None:
    program = rewrite.apply(transformer(), "dyt", verify=False)
    inputs = tokens(3, 5)
    run = rewrite.lower(program, "inductor", dynamic=False)
    assert error(rewrite.lower(program)(*inputs), run(*inputs)) < TOLERANCE


@pytest.mark.gpu
def test_on_cuda() -> None:
    torch.manual_seed(0)
    program = capture(Transformer().cuda(), [t.cuda() for t in tokens(2, 6)])
    run, eager = rewrite.lower(program, "inductor"), rewrite.lower(program)
    for batch, length in ((2, 6), (3, 9), (1, 4)):
        inputs = [t.cuda() for t in tokens(batch, length)]
        assert error(eager(*inputs), run(*inputs)) < TOLERANCE
