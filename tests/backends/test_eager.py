"""The eager lowering: the program itself, for inference."""

from __future__ import annotations

import inspect

import pytest
import torch

import rewrite
from tests.backends.models import Transformer, error, mlp, tokens, transformer
from tests.captures import capture


def test_it_is_the_model_in_evaluation_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = Transformer()
    run = rewrite.lower(capture(model, tokens(2, 6)), "eager")
    for batch, length in ((2, 6), (3, 9), (1, 4)):
        inputs = tokens(batch, length)
        assert error(model.eval()(*inputs), run(*inputs)) == 0


def test_it_is_the_default() -> None:
    x = torch.randn(4, 8)
    program = mlp()
    assert error(program.clone().module.eval()(x), rewrite.lower(program)(x)) == 0


def test_it_has_the_signature_of_the_model() -> None:
    run = rewrite.lower(transformer())
    ids, mask = tokens(2, 6)
    assert list(inspect.signature(run).parameters) == ["ids", "mask", "scale"]
    assert error(run(ids, mask), run(mask=mask, ids=ids, scale=1.0)) == 0


def test_it_takes_no_gradient() -> None:
    assert not rewrite.lower(mlp())(torch.randn(4, 8)).requires_grad


def test_the_program_is_left_as_it_is_and_its_changes_do_not_reach_the_lowering() -> None:
    program = mlp()
    program.module.train()
    before = {name: value.clone() for name, value in program.module.state_dict().items()}
    x = torch.randn(4, 8)
    run = rewrite.lower(program)
    expected = run(x)
    assert program.module.training
    assert all(torch.equal(value, before[name]) for name, value in program.module.state_dict().items())
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.zero_()
    assert torch.equal(run(x), expected)


@pytest.mark.gpu
def test_on_cuda() -> None:
    torch.manual_seed(0)
    model = Transformer().cuda()
    inputs = [t.cuda() for t in tokens(2, 6)]
    run = rewrite.lower(capture(model, inputs))
    assert error(model.eval()(*inputs), run(*inputs)) == 0
