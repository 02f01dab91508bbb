"""share-norm: the models the kit tries it on, its formula, one tensor a norm less, and what stands in its way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.passes.memory.share_norm import SharedNorm
from tests.passes.table import Row

ROWS = [
    Row("share-norm", "gpt2", 12, near_miss={"ln_f": "no layer keeps its result"}),
    Row("share-norm", "llama", 14),
    Row("share-norm", "bert", 0, near_miss={"embeddings.LayerNorm": "no layer keeps its result"}),
]

X = torch.randn(5, 24)


class Block(nn.Module):
    """x + down(tanh(up(norm(x))))."""

    def __init__(self, norm: nn.Module, between: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.between = norm, between or nn.Identity()
        self.up, self.act, self.down = nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.act(self.up(self.between(self.norm(x)))))
        return found


def net(kind: type[nn.Module] = nn.LayerNorm, affine: bool = True, between: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    make: Any = kind
    norms = [make(24, elementwise_affine=affine) for _ in range(2)]
    if affine:
        for norm in norms:
            for p in norm.parameters():
                nn.init.uniform_(p, 0.5, 1.5)
    return nn.Sequential(nn.Linear(24, 24), *(Block(norm, between) for norm in norms))


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.train()
    torch.manual_seed(1)
    given = x.clone().requires_grad_()
    return list(torch.autograd.grad(module(given).square().sum(), [given, *module.parameters()]))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_the_gradient_is_that_of_the_norm(kind: Any) -> None:
    inner = kind(24, elementwise_affine=False).double()
    layer = SharedNorm(inner, 1, inner.eps, kind is nn.LayerNorm)
    x, dy = torch.randn(2, 4, 7, 24, dtype=torch.float64).unbind()
    got, true = (
        torch.autograd.grad(f(given), given, dy)[0]
        for f, given in ((layer, x.clone().requires_grad_()), (inner, x.clone().requires_grad_()))
    )
    assert torch.allclose(got, true, rtol=0, atol=1e-14)
    assert torch.equal(layer(x.requires_grad_()), inner(x))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_the_gradient_can_be_differentiated(kind: Any) -> None:
    inner = kind(6, eps=0.1, elementwise_affine=False).double()
    layer = SharedNorm(inner, 1, 0.1, kind is nn.LayerNorm)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: layer(t).sin(), (x,))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_a_norm_less(kind: Any, dtype: torch.dtype) -> None:
    """Of LayerNorm go the input and the two statistics, a number of four bytes a row comes."""
    x = X.to(dtype)
    model = net(kind, affine=False).to(dtype)
    program = rewrite.apply(model, "share-norm", args=(x,))
    assert [site.path for site in program.history[0].changes] == ["1.norm", "2.norm"]
    before, after = rewrite.memory(model, (x,)), rewrite.memory(program)
    for path in ("1.norm", "2.norm"):
        kept = {each.dtype: each.bytes for each in after.kept if each.path == path}
        assert sum(kept.values()) == 5 * 24 * dtype.itemsize + 5 * 4
    assert before.bytes - after.bytes >= 2 * 5 * 24 * dtype.itemsize
    assert torch.equal(program.module(x), model(x))


def test_weights_and_biases_are_folded() -> None:
    model = net().double()
    x = X.double()
    program = rewrite.apply(model, "share-norm", args=(x,))
    assert torch.allclose(program.module(x), model(x), rtol=0, atol=1e-12)
    assert "1.norm.weight" not in program.module.state_dict()
    assert torch.allclose(gradients(program.module, x)[0], gradients(model, x)[0], rtol=0, atol=1e-11)


def test_for_inference_the_norm_is_back() -> None:
    program = rewrite.apply(net(affine=False), "share-norm", args=(X,))
    lowered: Any = rewrite.lower(program)
    assert type(lowered.module.get_submodule("1.norm")) is nn.LayerNorm


class Twice(nn.Module):
    """A norm whose input another layer keeps, one whose result a dropout takes, one that no linear layer reads alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.first, self.second, self.third = nn.Linear(24, 24), *(nn.LayerNorm(24, bias=False) for _ in range(3))
        self.drop, self.a, self.b, self.c = nn.Dropout(0.1), *(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        z = self.a(self.first(y)) + self.b(y)
        z = z + self.drop(self.second(z))
        third = self.third(z)
        return self.c(third) + third


def test_what_stands_in_the_way_is_named() -> None:
    (record,) = rewrite.apply(Twice(), "share-norm", args=(X,)).history
    assert {s.path: s.reason for s in record.skipped} == {
        "first": "what it is given is kept by b anyway",
        "second": "no layer keeps its result",
        "third": "add_2 reads it, which is no linear layer or convolution",
    }
