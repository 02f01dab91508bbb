"""shallow: the models the kit tries it on, the function by hand, stacks, one norm for all, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite import RewriteError, apply
from rewrite.errors import PipelineError
from tests.passes.table import Row

from .test_parallel_block import Block, Flat, X

ROWS = [
    Row("shallow{layers=0-1}", "gpt2", 1),
    Row("shallow{layers=1}", "bert", 0, near_miss={"encoder.layer.1": "its norm stands after the addition"}),
]


def test_by_hand() -> None:
    model = nn.Sequential(*(Block() for _ in range(4)))
    program = apply(model, "shallow{layers='1-2'}", args=(X,))
    x = model[0](X)
    for block in [*model][1:3]:
        x = x + block.attention(block.norm1(model[0](X))) + block.ffn(block.norm2(model[0](X)))
    assert torch.allclose(program.module(X), model[3](x), atol=1e-5)
    (record,) = program.history
    assert [s.name for s in record.steps] == ["branches-side-by-side", "share-norms"]
    assert {s.reason for s in record.skipped} >= {"layer 0 is not among the chosen"}


def test_a_stream_that_is_flattened_in_between() -> None:
    model = nn.Sequential(Flat(), Flat())
    program = apply(model, "shallow{layers='0-1'}", args=(X,))
    added = sum((b.attention(b.norm1(X)) + b.ffn(b.norm2(X)) for b in model), torch.zeros(()))
    assert torch.allclose(program.module(X), X + added, atol=1e-6)


def test_layers_apart_are_stacks_of_their_own_and_one_norm_serves_each() -> None:
    model = nn.Sequential(*(Block(affine=False) for _ in range(5)))
    program = apply(model, "shallow{layers='0-1,3-4'}", args=(X,))
    norms = [str(n.target) for n, layer in program.layers() if isinstance(layer, nn.LayerNorm)]
    assert norms == ["0.norm1", "2.norm1", "2.norm2", "3.norm1"]
    start, x = X, X
    for block in [*model][:2]:
        x = x + block.attention(block.norm1(start)) + block.ffn(block.norm2(start))
    start = x = model[2](x)
    for block in [*model][3:]:
        x = x + block.attention(block.norm1(start)) + block.ffn(block.norm2(start))
    assert torch.allclose(program.module(X), x, atol=1e-5)


def test_layers_that_are_none_are_refused() -> None:
    for text, words in (("layers=3", "the model has layers 0 to 0"), ("", "needs to be told which layers")):
        with pytest.raises(RewriteError, match=words):
            apply(Block(), f"shallow{{{text}}}", args=(X,))
    with pytest.raises(PipelineError, match="option 'layers'"):
        apply(Block(), "shallow{layers=x}", args=(X,))
