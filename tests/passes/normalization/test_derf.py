"""derf: the models the kit tries it on, and its formula: y = weight * erf(alpha * x + shift) + bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite import apply
from rewrite.passes.normalization.derf import Derf, DynamicErf
from tests.passes.normalization.test_dyt import DIM, sequences
from tests.passes.table import Row

ROWS = [
    Row("derf", "EncoderLayer", {"layer.norm1", "layer.norm2"}),
    Row("derf{calibrate=lsq fallback=1}", "EncoderLayer", {"layer.norm1", "layer.norm2"}, data=sequences),
    Row("derf{alpha=1}", "gpt2", 5),
    Row("derf", "resnet18", 0),
]


def test_formula_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    module = apply(model, "derf{alpha=0.7}", args=(torch.randn(2, 5, DIM),)).module
    layer = module.get_submodule("1")
    assert isinstance(layer, DynamicErf)
    x = torch.randn(3, 5, DIM)
    expected = model[1].weight * torch.erf(0.7 * model[0](x)) + model[1].bias
    torch.testing.assert_close(module(x), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "alpha", "shift"]
    assert not layer.shift.any()


def test_reference_is_the_formula_with_its_gradient() -> None:
    layer = DynamicErf(None, None, (5,), alpha=torch.full((1,), 0.9), shift=torch.full((1,), 0.2))
    u = torch.tensor([-9.0, -1e-9, 0.0, 0.3, 40.0], dtype=torch.float64, requires_grad=True)
    y = Derf().reference(None, layer.double(), u)
    torch.testing.assert_close(y, torch.erf(0.9 * u + 0.2), rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(y.sum(), u)
    (expected,) = torch.autograd.grad(torch.erf(layer.alpha * u + layer.shift).sum(), u)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-5, 0.5, 3.0])
def test_reference_is_exact_for_small_numbers(value: float) -> None:
    layer = DynamicErf(None, None, (1,), alpha=torch.ones(1), shift=torch.zeros(1)).double()
    u = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(Derf().reference(None, layer, u), torch.erf(u), rtol=1e-13, atol=0)
