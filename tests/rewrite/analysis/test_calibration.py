"""Calibration: the fit of least squares and the formula by hand, errors, fallback, roles, and what a run records."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply
from rewrite.analysis.calibration import ERF, ROOT, TANH, Curve, calibrated
from rewrite.analysis.norms import norms
from rewrite.analysis.roles import roles
from rewrite.graph.history import Record
from rewrite.graph.layers import BiasedRMSNorm
from tests.captures import capture, shared

DIM = 16


def model_of(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(DIM, DIM), norm, nn.Linear(DIM, 3))
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.normal_(mean=float(name == "weight"))
    return made


DATA = [torch.randn(20, 5, DIM, generator=torch.Generator().manual_seed(i)) for i in range(3)]
NORMS: dict[str, Any] = {
    "layer": lambda: nn.LayerNorm(DIM),
    "layer without bias": lambda: nn.LayerNorm(DIM, bias=False),
    "bare": lambda: nn.LayerNorm(DIM, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(DIM, eps=1e-6),
    "over two axes": lambda: nn.LayerNorm((5, DIM)),
}
CURVES = {"tanh": TANH, "erf": ERF, "root": ROOT}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("curve", CURVES)
def test_least_squares_by_hand(name: str, curve: str) -> None:
    model = model_of(NORMS[name]())
    program = capture(model, (DATA[0],))
    fit = calibrated(program, norms(program), CURVES[curve], "lsq", DATA)["1"]
    with torch.no_grad():
        x = torch.cat([model[0](item) for item in DATA]).double()
        y = model[1](x.float()).double()
    t = CURVES[curve].function(fit.scale * x).flatten(0, 1 if name != "over two axes" else 0)
    y = y.reshape(t.shape)
    for place in [(0,), (DIM - 1,)] if name != "over two axes" else [(0, 0), (4, 7)]:
        column, target = t[(slice(None), *place)], y[(slice(None), *place)]
        rows = torch.stack([column, torch.ones_like(column)], 1) if fit.bias is not None else column[:, None]
        found = torch.linalg.lstsq(rows, target[:, None]).solution[:, 0]
        assert fit.weight[place] == pytest.approx(float(found[0]), rel=1e-5)
        if fit.bias is not None:
            assert fit.bias[place] == pytest.approx(float(found[1]), rel=1e-4, abs=1e-6)
    made = fit.weight * t + (0 if fit.bias is None else fit.bias)
    assert fit.error == pytest.approx(float(((made - y).square().sum() / y.square().sum()).sqrt()), rel=1e-6)
    assert (fit.bias is None) == (name not in ("layer", "over two axes"))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_formula_by_hand(name: str) -> None:
    model = model_of(NORMS[name]())
    program = capture(model, (DATA[0],))
    fit = calibrated(program, norms(program), TANH, "formula", DATA)["1"]
    with torch.no_grad():
        x = torch.cat([model[0](item) for item in DATA]).double()
    m = DIM - (name == "layer")
    square = x.var(-1, correction=0) if name == "layer" else x.square().mean(-1)
    sigma = 1 / (square + model[1].eps).rsqrt().mean()
    assert fit.scale == pytest.approx(math.sqrt(m) / (DIM * float(sigma)))
    torch.testing.assert_close(fit.weight, math.sqrt(m) * model[1].weight.detach().double())
    assert 0 < fit.error < 0.6


@pytest.mark.parametrize("curve", CURVES)
def test_the_formula_has_the_slope_of_the_norm_of_one_coordinate(curve: str) -> None:
    """At 0, and for many channels: weight · f'(0) · scale = 1 / σ."""
    c, m, sigma = 4096, 4095, 0.3
    found: Curve = CURVES[curve]
    x = torch.tensor(1e-6, dtype=torch.float64)
    slope = found.function(found.scale(c, m, sigma) * x) / x * math.sqrt(m)
    assert float(slope) == pytest.approx(1 / sigma, rel=1e-3)


def test_least_squares_is_no_worse_than_the_formula() -> None:
    program = capture(model_of(nn.LayerNorm(DIM)), (DATA[0],))
    lsq, formula = (calibrated(program, norms(program), TANH, how, DATA)["1"] for how in ("lsq", "formula"))
    assert lsq.error <= formula.error + 1e-9


def test_a_norm_that_is_called_twice_has_one_fit() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(self.norm(x)) * 3)

    record = apply(Twice(), "dyt{calibrate=lsq fallback=1}", args=(DATA[0],), data=DATA).history[-1]
    assert [m.path for m in record.measured] == ["norm"]


def test_what_is_too_far_becomes_an_rms_norm() -> None:
    model = model_of(nn.LayerNorm(DIM))
    result = apply(model, "dyt{calibrate=lsq fallback=0.001}", args=(DATA[0],), data=DATA)
    layer = result.module.get_submodule("1")
    assert isinstance(layer, BiasedRMSNorm)
    assert torch.equal(layer.weight, model[1].weight)
    assert torch.equal(layer.bias, model[1].bias)
    (record,) = result.history
    assert record.measured[0].figures["layer"] == "BiasedRMSNorm"
    (norm,) = norms(result)
    assert (norm.kind, norm.bias_path) == ("rms", "1.bias")


def test_an_rms_norm_that_is_too_far_stays() -> None:
    (record,) = apply(model_of(nn.RMSNorm(DIM)), "dyt{calibrate=lsq fallback=0.001}", args=(DATA[0],), data=DATA).history
    assert not record.changed
    assert "is above fallback=0.001" in record.skipped[0].reason


def test_what_was_measured_is_in_the_record_and_in_json() -> None:
    (record,) = apply(model_of(nn.LayerNorm(DIM)), "dyt{calibrate=lsq fallback=1}", args=(DATA[0],), data=DATA).history
    (found,) = record.measured
    assert (found.path, list(found.figures)) == ("1", ["role", "scale", "error", "layer"])
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert again.measured == record.measured
    assert record.data is not None


@pytest.mark.parametrize("how", ["lsq", "formula"])
def test_calibration_needs_data(how: str) -> None:
    with pytest.raises(RewriteError, match=rf"dyt\{{calibrate={how}\}} needs data"):
        apply(model_of(nn.LayerNorm(DIM)), f"dyt{{calibrate={how}}}", args=(DATA[0],))


def test_calibrated_is_closer_than_not() -> None:
    model, x = model_of(nn.LayerNorm(DIM)), DATA[0]
    expected = model(x)
    fitted, plain = (apply(model, t, args=(x,), data=DATA).module(x) for t in ("dyt{calibrate=lsq fallback=1}", "dyt"))
    assert (fitted - expected).norm() < 0.5 * (plain - expected).norm()


@pytest.mark.xdist_group("gpt2")
def test_roles() -> None:
    program = shared("gpt2")
    assert {str(node.target): role for node, role in roles(program).items()} == {
        "h.0.ln_1": "attention",
        "h.0.ln_2": "ffn",
        "h.1.ln_1": "attention",
        "h.1.ln_2": "ffn",
        "ln_f": "final",
    }


@pytest.mark.xdist_group("bert")
def test_roles_of_post_norms() -> None:
    found = {str(node.target): role for node, role in roles(shared("bert")).items()}
    assert found["embeddings.LayerNorm"] == "other"
    assert sorted(found.values()) == ["attention", "attention", "ffn", "ffn", "other"]


@pytest.mark.xdist_group("llama")
def test_an_alpha_for_each_role() -> None:
    result = apply(
        shared("llama"), "dyt{alpha=9 alpha_attention=0.8 alpha_ffn=0.3 alpha_final=0.2}", verify=False, share=True
    )
    alphas = {n.removesuffix(".alpha"): round(float(p), 3) for n, p in result.module.named_parameters() if "alpha" in n}
    assert alphas == {
        "layers.0.input_layernorm": 0.8,
        "layers.0.post_attention_layernorm": 0.3,
        "layers.1.input_layernorm": 0.8,
        "layers.1.post_attention_layernorm": 0.3,
        "norm": 0.2,
    }
