"""randomized-linear: the models the kit tries it on, each sketch unbiased, bytes by the closed form, new draws a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.passes.memory.randomized_linear import RandomizedLinear
from rewrite.training.sketch import SKETCHES, height, matrix
from tests.passes.table import Row

ROWS = [
    Row("randomized-linear{ratio=0.5}", "gpt2", 8),
    Row(
        "randomized-linear{sketch=rows ratio=0.5 where=layers.0.*}",
        "vit",
        3,
        near_miss={"layers.0.attention.q_proj": "no smaller"},
    ),
    Row("randomized-linear", "Frozen", 0),
]

X = torch.randn(40, 24)


def net(p: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Dropout(p), nn.Linear(32, 48), nn.Dropout(p), nn.Linear(48, 4))


def gradients(module: nn.Module, seed: int | None = 1) -> list[Tensor]:
    module.train()
    if seed is not None:
        torch.manual_seed(seed)
    return list(torch.autograd.grad(module(X).square().sum(), list(module.parameters())))


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize(("rows", "count"), [(3, 10), (8, 8), (1, 6)])
def test_the_mean_of_the_sketch_is_the_identity(sketch: str, rows: int, count: int) -> None:
    """E[Sᵀ S] = k I, by 4000 draws, within five standard errors at each number and at their typical size."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([(s := matrix(generator, rows, count, sketch)).t() @ s / rows for _ in range(4000)])
    deviation = draws.std(0).clamp(min=float(draws.std(0).square().mean().sqrt())) / 4000**0.5
    assert bool(((draws.mean(0) - torch.eye(count)).abs() <= 5 * deviation + 1e-5).all())


@pytest.mark.parametrize("sketch", SKETCHES)
def test_the_mean_of_many_draws_is_the_gradient(sketch: str) -> None:
    """dW over 600 steps; the gradients of input and bias are exact in each."""
    torch.manual_seed(0)
    inner = nn.Linear(6, 5)
    program = rewrite.apply(nn.Sequential(nn.Linear(6, 6), inner), f"randomized-linear{{sketch={sketch}}}", args=(X[:, :6],))
    layer: Any = program.module.get_submodule("1")
    assert type(layer) is RandomizedLinear
    x, dy = torch.randn(30, 6), torch.randn(30, 5)
    draws = []
    for _ in range(600):
        given = x.clone().requires_grad_()
        dx, dw, db = torch.autograd.grad(layer(given), [given, layer.weight, layer.bias], dy)
        assert torch.allclose(dx, dy @ layer.weight)
        assert torch.allclose(db, dy.sum(0), atol=1e-5)
        draws.append(dw)
    found = torch.stack(draws)
    deviation = found.std(0) / 600**0.5
    assert bool(((found.mean(0) - dy.t() @ x).abs() <= 5 * deviation).all())
    assert bool((found.std(0) > 0).all())


@pytest.mark.parametrize(("count", "ratio", "rows"), [(10, 0.2, 2), (11, 0.2, 3), (1, 0.01, 1), (7, 1.0, 7)])
def test_rows_of_a_sketch(count: int, ratio: float, rows: int) -> None:
    assert height(count, ratio) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_closed_form(dtype: torch.dtype) -> None:
    """8 rows of 40 and a seed in place of the inputs of both layers behind dropouts; the first one's is the model's."""
    model, x = net().to(dtype), X.to(dtype)
    program = rewrite.apply(model, "randomized-linear", args=(x,))
    before, after = rewrite.memory(model, (x,)).bytes, rewrite.memory(program).bytes
    assert before - after == (40 - 8) * (32 + 48) * dtype.itemsize - 2 * 8
    assert program.history[0].skipped[0].reason == "what it is given is an input, which is kept anyway"


def test_each_step_draws_anew_a_seed_gives_the_same_and_the_forward_is_the_same() -> None:
    model = net(0.5)
    module = rewrite.apply(model, "randomized-linear", args=(X,)).module
    first, again = gradients(module), gradients(module)
    assert all(map(torch.equal, first, again))
    torch.manual_seed(1)
    second = [gradients(module, None) for _ in range(2)]
    assert all(map(torch.equal, first, second[0]))
    module.eval()
    steps = [torch.autograd.grad(module(X).sum(), module.get_submodule("3").weight)[0] for _ in range(2)]
    assert not torch.equal(*steps)
    torch.manual_seed(5)
    wanted = model.train()(X)
    torch.manual_seed(5)
    assert torch.equal(module.train()(X), wanted)


def test_under_autocast_the_forward_is_the_same() -> None:
    model = net().eval()
    module = rewrite.apply(model, "randomized-linear{ratio=0.98 sketch=rows}", args=(X,)).module.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), module(X))
        exact, got = (torch.autograd.grad(m(X).sum(), list(m.parameters())) for m in (model, module))
    assert all(float((a - b).norm()) < 0.02 * float(a.norm()) for a, b in zip(exact, got, strict=True))


class Shared(nn.Module):
    """An input that a norm keeps, weights that are tied, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.a = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24)
        self.b, self.c, self.twice = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        found: Tensor = self.a(y) + self.twice(self.twice(self.b(self.norm(y)).sin() + self.c(self.norm(y) + 1).cos()))
        return found


def test_what_stands_in_the_way_is_named() -> None:
    (record,) = rewrite.apply(Shared(), "randomized-linear", args=(X,)).history
    assert {s.path: s.reason for s in record.skipped} == {
        "up": "what it is given is an input, which is kept anyway",
        "a": "what it is given is kept by norm anyway",
        "b": "it shares its weight with c.weight",
        "c": "it shares its weight with b.weight",
        "twice": "it is called more than once",
    }


def test_a_sketch_of_one_row_is_no_estimate() -> None:
    """A classifier sees a row for each image."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Flatten(), nn.Linear(40, 3))
    record = rewrite.apply(model, "randomized-linear", args=(torch.randn(2, 5, 6),)).history[-1]
    assert not record.changed
    reasons = {skip.path: skip.reason for skip in record.skipped}
    assert reasons["2"] == "a sketch of one row for 2 is no estimate: take a larger batch, or a larger ratio"
