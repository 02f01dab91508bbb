"""random-ltd: the models the kit tries it on, a layer on the tokens kept alone by hand, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import apply
from tests.passes.table import Row

from .test_parallel_block import Block as SpelledOut

X = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))

ROWS = [
    Row("random-ltd{layers=1}", "llama", 6, near_miss={"layers.0": "layer 0 is not among layers=1"}),
    Row("random-ltd{layers=all}", "resnet18", 0, near_miss={"layer1.0": "its stream is not"}),
]


class Block(nn.Module):
    """Attention and FFN, causal or with a mask that forbids the second token."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.causal = nn.LayerNorm(8), nn.LayerNorm(8), causal
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = (f(n).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = None if self.causal else torch.arange(k.shape[-2]) != 1
        y = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[None, :], is_causal=self.causal)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class Flat(Block):
    """All tokens are on one axis where the FFN reads them."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = (f(n).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        rows = (x + self.o(y.transpose(1, 2).flatten(2))).reshape(-1, 8)
        return (rows + self.ffn(self.norm2(rows))).view(x.shape)


@pytest.mark.parametrize(("kind", "causal"), [(Block, True), (Block, False), (Flat, True)])
def test_the_tokens_kept_go_through_the_layer_as_if_the_others_were_not_there(kind: type[Block], causal: bool) -> None:
    model = kind(causal)
    program = apply(model, "random-ltd{layers=all rate=0.4}", args=(X,))
    seen: list[Any] = []
    name = next(str(n.target) for n, layer in program.layers() if type(layer).__name__ == "TokensKept")
    program.module.get_submodule(name).register_forward_hook(lambda layer, inputs, output: seen.append(output))
    torch.manual_seed(0)
    y = program.module.train()(X)
    (kept,) = seen
    assert kept.sum(1).tolist() == [5, 5, 5]
    assert not torch.equal(kept[0], kept[1])
    for sample in range(3):
        rows = kept[sample] if causal else kept[sample] & (torch.arange(8) != 1)
        expected = _attended(model, X[sample], kept[sample], rows)
        torch.testing.assert_close(y[sample], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(program.module.eval()(X), model.eval()(X))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in program.module.parameters())


def _attended(model: Block, x: Tensor, kept: Tensor, keys: Tensor) -> Tensor:
    """The block on the tokens kept, which see those of ``keys``, those before them where it is causal."""
    n = model.norm1(x)
    q, k, v = (f(n).unflatten(-1, (2, 4)).transpose(0, 1) for f in (model.q, model.k, model.v))
    allowed = keys[None, :].expand(8, 8)
    allowed = allowed.tril() if model.causal else allowed
    weights = (q @ k.mT / 2).masked_fill(~allowed, -torch.inf).softmax(-1)
    x1 = x + model.o((weights @ v).transpose(0, 1).flatten(1))
    return torch.where(kept[:, None], x1 + model.ffn(model.norm2(x1)), x)


def test_an_attention_that_is_spelled_out_is_left_alone() -> None:
    (record,) = apply(SpelledOut(), "random-ltd{layers=all}", args=(X,)).history
    assert [s.reason.partition(" mixes tokens")[2] for s in record.skipped] == [
        ", and is no attention whose softmax is one layer"
    ]


def test_the_middle_is_all_but_the_first_and_the_last_layer_and_a_second_run_leaves_it_alone() -> None:
    program = apply(nn.Sequential(*(Block(True) for _ in range(3))), "random-ltd,random-ltd", args=(X,))
    assert [s.path for s in program.history[0].skipped] == ["0", "2"]
    assert [s.reason for s in program.history[1].skipped if s.path == "1"] == ["tokens skip it already"]
