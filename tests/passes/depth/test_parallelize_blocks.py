"""parallelize-blocks: the models the kit tries it on, the function by hand, pairs and more, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply
from rewrite.errors import PipelineError
from tests.passes.table import Row

from .test_parallel_block import Block, X

ROWS = [
    Row("parallelize-blocks{pairs=0-1}", "gpt2", 3),
    Row("parallelize-blocks{pairs=0-1}", "bert", 0, near_miss={"encoder.layer.0.output": "its norm stands after"}),
]


def together(blocks: list[nn.Module], x: Tensor) -> Tensor:
    return x + sum((block(x) - x for block in blocks), torch.zeros(()))


@pytest.mark.parametrize(
    ("pairs", "groups"), [("1-2", [[0], [1, 2], [3]]), ("0-1,2-3", [[0, 1], [2, 3]]), ("1-3", [[0], [1, 2, 3]])]
)
def test_by_hand(pairs: str, groups: list[list[int]]) -> None:
    model = nn.Sequential(*(Block() for _ in range(4)))
    program = apply(model, f"parallelize-blocks{{pairs='{pairs}'}}", args=(X,))
    x = X
    for group in groups:
        x = together([model[i] for i in group], x)
    assert torch.allclose(program.module(X), x, atol=1e-5)
    (record,) = program.history
    promises = [(s.name, s.contract.partition(",")[0]) for s in record.steps]
    assert promises == [
        ("blocks-with-sums-of-their-own", "forward same"),
        ("blocks-side-by-side", "forward close"),
    ]
    chosen = {str(i) for group in groups if len(group) > 1 for i in group}
    assert {s.path for s in record.skipped if "not among" in s.reason} == {"0", "1", "2", "3"} - chosen


def test_a_stream_that_something_reads_between_the_blocks_is_left_alone() -> None:
    class Read(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            first = self[0](x)
            return first, self[1](first)

    (record,) = apply(Read(Block(), Block()), "parallelize-blocks{pairs=0-1}", args=(X,)).history
    assert [s.reason for s in record.skipped] == ["output reads what flows between it and the block before"]


def test_layers_that_are_none_are_refused() -> None:
    for text, words in (("pairs=0-3", "the model has layers 0 to 0"), ("", "needs to be told which layers")):
        with pytest.raises(RewriteError, match=words):
            apply(Block(), f"parallelize-blocks{{{text}}}", args=(X,))
    with pytest.raises(PipelineError, match="option 'pairs'"):
        apply(Block(), "parallelize-blocks{pairs=x}", args=(X,))
