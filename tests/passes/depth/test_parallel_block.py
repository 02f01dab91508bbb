"""parallel-block: the models the kit tries it on, the function by hand, one norm for both, what is left alone and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply
from rewrite.analysis.branches import branches
from rewrite.errors import PipelineError
from tests.captures import shared
from tests.passes.table import Row

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

ROWS = [
    Row("parallel-block{layers=1}", "gpt2", 1, near_miss={"h.0.mlp": "layer 0 is not among layers=1"}),
    Row("parallel-block", "bert", 0, near_miss={"encoder.layer.0": "its norm stands after the addition"}),
    Row("parallel-block", "resnet18", 0),
]


class Block(nn.Module):
    """Pre-norm attention and FFN, one after the other; ``affine`` norms have weights."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(8, elementwise_affine=affine) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.fc1, self.fc2, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()

    def attention(self, n: Tensor) -> Tensor:
        return self.o(torch.softmax(self.q(n) @ self.k(n).mT, -1) @ self.v(n))  # type: ignore[no-any-return]

    def ffn(self, n: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(n)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))

    def parallel(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x)) + self.ffn(self.norm2(x))


class Flat(Block):
    """Its stream has no axis of samples before the FFN, as in OPT."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        rows = x.reshape(-1, 8)
        return (rows + self.ffn(self.norm2(rows))).view(x.shape)


def test_a_stream_that_is_flattened_in_between() -> None:
    model = nn.Sequential(Flat(), Flat())
    program = apply(model, "parallel-block", args=(X,))
    expected = model[1].parallel(model[0].parallel(X))
    assert torch.allclose(program.module(X), expected, atol=1e-6)
    assert program.history[0].steps[0].name == "branches-with-reshapes-of-their-own"


def test_by_hand() -> None:
    model = Block()
    program = apply(model, "parallel-block", args=(X,))
    assert torch.allclose(program.module(X), model.parallel(X), atol=1e-6)
    (record,) = program.history
    assert [(s.name, s.contract) for s in record.steps] == [
        ("ffn-beside-attention", "forward close, backward new"),
        ("share-norms", "forward same, backward same"),
    ]
    assert [s.reason for s in record.steps[1].skipped] == [
        "norm1 cannot serve for it: they have weights of their own; fold-affine before this pass takes them out"
    ]


def test_one_norm_serves_both_once_their_weights_are_folded_and_all_projections_become_one() -> None:
    model = nn.Sequential(Block(), Block())
    program = apply(model, "fold-affine,parallel-block,merge-linears", args=(X,))
    assert [str(n.target) for n, layer in program.layers() if isinstance(layer, nn.LayerNorm)] == ["0.norm1", "1.norm1"]
    assert "0.norm2" not in dict(program.module.named_modules())
    merged = [str(n.target) for n, layer in program.layers() if type(layer).__name__ == "MergedLinear"]
    assert merged == ["0.q_k_v_fc1", "1.q_k_v_fc1"]
    expected = model[1].parallel(model[0].parallel(X))
    assert torch.allclose(program.module(X), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "vit", "t5"])
def test_branches_stand_side_by_side(name: str) -> None:
    program = apply(shared(name), "parallel-block", verify=False)
    record = program.history[0]
    ffns = [b for b in branches(program) if b.kind in ("ffn", "gated ffn")]
    skipped = {s.path: s.reason for s in record.skipped}
    assert all(b.parallel or skipped[b.path] == "it does not read the sum of an attention" for b in ffns)
    assert any(b.parallel for b in ffns)


def test_a_stream_that_is_written_in_place_is_left_alone() -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            x += self.attention(self.norm1(x))
            return x + self.ffn(self.norm2(x))

    (record,) = apply(InPlace(), "parallel-block", args=(X,)).history
    assert [s.reason for s in record.skipped] == ["the stream is written in place"]


def test_layers_that_are_none_are_refused() -> None:
    with pytest.raises(RewriteError, match="the model has layers 0 to 0"):
        apply(Block(), "parallel-block{layers=3}", args=(X,))
    with pytest.raises(PipelineError, match="option 'layers'"):
        apply(Block(), "parallel-block{layers=x}", args=(X,))
