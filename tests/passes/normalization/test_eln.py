"""eln: the models the kit tries it on, its formula, and where it is the norm of one coordinate itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rewrite import apply
from rewrite.passes.normalization.eln import ELN, ElementwiseNorm
from tests.passes.normalization.test_dyt import DIM, sequences
from tests.passes.table import Row

ROWS = [
    Row("eln", "EncoderLayer", {"layer.norm1", "layer.norm2"}),
    Row("eln{calibrate=lsq fallback=1}", "EncoderLayer", {"layer.norm1", "layer.norm2"}, data=sequences),
    Row("eln{form=rms}", "llama", 5),
    Row("eln", "resnet18", 0),
]


@pytest.mark.parametrize("form", ["layer", "rms"])
def test_it_is_the_norm_of_one_coordinate_with_the_others_fixed(form: str) -> None:
    """beta = C s² and center = m of the C - 1 others (rms: beta the sum of their squares): exact, whatever x is."""
    others, x = torch.randn(DIM - 1, dtype=torch.float64), torch.linspace(-9, 9, 31, dtype=torch.float64)
    rows = torch.cat([x[:, None], others.expand(31, -1)], 1)
    if form == "layer":
        expected = nn.functional.layer_norm(rows, (DIM,), eps=0.0)[:, 0]
        beta, center = DIM * others.var(correction=0), others.mean().reshape(1)
    else:
        expected = rows[:, 0] * rows.square().mean(1).rsqrt()
        beta, center = others.square().sum(), None
    layer = ElementwiseNorm(None, None, (DIM,), beta=beta.reshape(1), center=center).double()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ELN().reference(None, layer, x), expected, rtol=1e-12, atol=1e-12)


def test_alpha_is_one_over_the_deviation_of_the_tokens() -> None:
    """Near 0, for tokens of deviation 1 / alpha, it is the norm: weight · alpha · x."""
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM))
    layer = apply(model, "eln{alpha=2}", args=(torch.randn(2, DIM),)).module.get_submodule("1")
    assert isinstance(layer, ElementwiseNorm)
    assert float(layer.beta.detach()) == pytest.approx(DIM / 4)
    x = torch.full((1, DIM), 1e-4)
    torch.testing.assert_close(layer(x), 2 * x * math.sqrt((DIM - 1) / DIM), rtol=1e-5, atol=0)
