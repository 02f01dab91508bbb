"""layer-drop: the models the kit tries it on, layers that go as a whole, evaluation as it was, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite import RewriteError, apply
from rewrite.errors import PipelineError
from tests.passes.table import Row

from .test_parallel_block import Block, Flat, X

ROWS = [
    Row("layer-drop{layers=1}", "gpt2", 2, near_miss={"h.0": "layer 0 is not among layers=1"}),
    Row("layer-drop", "bert", 0, near_miss={"encoder.layer.0.output": "its norm stands after the addition"}),
]


@pytest.mark.parametrize("kind", [Block, Flat])
def test_a_layer_goes_as_a_whole_or_stays_as_it_is(kind: type[Block]) -> None:
    model = nn.Sequential(kind(), kind())
    program = apply(model, "layer-drop{rate=0.5}", args=(X,))
    with torch.no_grad():
        first, second = (block(X) for block in model)
        ways = {"none": X, "first": first, "second": second, "both": model[1](first)}
    found = set[str]()
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(24):
            y = program.module.train()(X)
            found.add(next(name for name, expected in ways.items() if torch.allclose(y, expected, atol=1e-6)))
    assert found == set(ways)
    assert torch.equal(program.module.eval()(X), model.eval()(X))


def test_a_second_run_leaves_it_alone() -> None:
    program = apply(apply(Block(), "layer-drop", args=(X,)), "layer-drop")
    assert [s.reason for s in program.history[-1].skipped] == ["it is left out at random already"]


def test_layers_that_are_none_are_refused() -> None:
    with pytest.raises(RewriteError, match="the model has layers 0 to 0"):
        apply(Block(), "layer-drop{layers=3}", args=(X,))
    with pytest.raises(PipelineError, match="option 'layers'"):
        apply(Block(), "layer-drop{layers=x}", args=(X,))
