"""dyt: the models the kit tries it on, and its formula: y = weight * tanh(alpha * x) + bias, trained values kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, RewriteError, apply
from rewrite.passes.normalization.dyt import DynamicTanh, DyT
from tests.captures import capture, shared
from tests.compare import case
from tests.models import stress
from tests.passes.table import Row

DIM = 8


def sequences() -> list[Tensor]:
    """Three batches for EncoderLayer."""
    return [torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(i)) for i in range(3)]


ROWS = [
    Row("dyt", "EncoderLayer", {"layer.norm1", "layer.norm2"}, compiled=True),
    Row("dyt{calibrate=lsq fallback=1}", "EncoderLayer", {"layer.norm1", "layer.norm2"}, data=sequences),
    Row("dyt{calibrate=formula fallback=0}", "EncoderLayer", {"layer.norm1", "layer.norm2"}, data=sequences),
    Row("dyt{alpha=0.8}", "vit", 5),
    Row("dyt", "llama", 5),
    Row("dyt", "gpt2", 5),
    Row(
        "dyt{where=h.0.*}",
        "gpt2",
        {"h.0.ln_1", "h.0.ln_2"},
        near_miss=dict.fromkeys(["h.1.ln_1", "h.1.ln_2", "ln_f"], "not selected by where=h.0.*"),
    ),
    Row("dyt", "t5", 12),
    Row("dyt", "convnext_atto", 10),
    Row("dyt", "bert", 5),
    Row("dyt", "RMSNormSpellings", {"torch", *(f"norms.{name}" for name in stress.RMSNormSpellings.spellings)}),
    Row("dyt", "CalledTwice", {"norm"}),
    Row("dyt", "SharedUnderTwoNames", {"first.1"}),
    Row("dyt", "LayerNormByHand", {"first", "last"}),
    Row("dyt", "FunctionalLayerNorm", {"layer_norm", "planes"}),
    Row("dyt", "ChannelsFirstNorms", {"norm"}),
    Row("dyt", "LayerNormNearMisses", 0),
    Row("dyt", "resnet18", 0),
]


def single(norm: nn.Module, *shape: int) -> tuple[nn.Module, Program]:
    """A model of one layer and one norm, with trained-looking parameters, and its program."""
    torch.manual_seed(0)
    channels_first = len(shape) == 4
    model = nn.Sequential(nn.Conv2d(DIM, DIM, 1) if channels_first else nn.Linear(DIM, DIM), norm)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model, capture(model, (torch.randn(*shape),))


def inserted(program: Program) -> dict[str, DynamicTanh]:
    return {str(n.target): layer for n, layer in program.layers() if isinstance(layer, DynamicTanh)}


NORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(DIM), (2, 5, DIM)),
    "layer without bias": (lambda: nn.LayerNorm(DIM, bias=False), (2, 5, DIM)),
    "layer without affine": (lambda: nn.LayerNorm(DIM, elementwise_affine=False), (2, 5, DIM)),
    "rms": (lambda: nn.RMSNorm(DIM), (2, 5, DIM)),
    "spelled rms": (lambda: stress.RMSNormSpelling("llama"), (2, 5, DIM)),
    "one plus weight": (lambda: stress.RMSNormSpelling("one_plus"), (2, 5, DIM)),
    "weightless": (lambda: Weightless(), (2, 5, DIM)),
    "channels first": (lambda: stress._SpelledLayerNorm(channels_first=True), (2, DIM, 4, 4)),
    "permuted": (lambda: stress._ChannelsFirstNorm(DIM), (2, DIM, 4, 4)),
}


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_formula_by_hand(name: str) -> None:
    make, shape = NORMS[name]
    model, program = single(make(), *shape)
    result = apply(program, "dyt{alpha=0.7}")
    x = torch.randn(3, *shape[1:])
    z = torch.tanh(0.7 * model[0](x))
    tensors = dict(model[1].named_parameters())
    axis = (-1, 1, 1) if len(shape) == 4 else (-1,)
    weight = tensors.get("weight", tensors.get("gamma", torch.ones(DIM))).reshape(axis)
    bias = tensors.get("bias", tensors.get("beta", torch.zeros(DIM))).reshape(axis)
    if name == "one plus weight":
        weight = 1 + weight
    assert torch.allclose(result.module(x), weight * z + bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_affine_parameters_are_carried_over_bit_for_bit(name: str) -> None:
    make, shape = NORMS[name]
    model, program = single(make(), *shape)
    layer = inserted(apply(program, "dyt"))["1"]
    old = dict(model[1].named_parameters())
    weight, bias = old.get("weight", old.get("gamma")), old.get("bias", old.get("beta"))
    offset = 1 if name == "one plus weight" else 0
    for new, trained in ((layer.weight, weight if weight is None else weight + offset), (layer.bias, bias)):
        assert (new is None) == (trained is None)
        assert new is None or torch.equal(new, trained.reshape(-1))
    assert layer.alpha.shape == (1,)
    assert layer.alpha.requires_grad


def test_state_dict_keeps_the_names_and_adds_alpha() -> None:
    program = shared("EncoderLayer")
    result = apply(program, "dyt", verify=False, share=True)
    added = result.module.state_dict().keys() - program.module.state_dict().keys()
    assert program.module.state_dict().keys() <= result.module.state_dict().keys()
    assert added == {"layer.norm1.alpha", "layer.norm2.alpha"}


def test_eps_and_shape_stay_for_code_that_reads_them() -> None:
    layer = inserted(apply(single(nn.LayerNorm(DIM, eps=1e-4), 2, DIM)[1], "dyt"))["1"]
    assert (layer.eps, layer.normalized_shape) == (1e-4, (DIM,))


def test_frozen_parameters_stay_frozen() -> None:
    norm = nn.LayerNorm(DIM)
    norm.requires_grad_(False)
    layer = inserted(apply(single(norm, 2, DIM)[1], "dyt"))["1"]
    assert layer.weight is not None
    assert not layer.weight.requires_grad
    assert layer.alpha.requires_grad


@pytest.mark.parametrize("level", [30.0, 37.0, 300.0])
def test_proof_holds_where_every_tanh_is_saturated(level: float) -> None:
    """The gradient is then rounding alone: 1 - tanh² of numbers next to 1."""
    program = apply(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "dyt", args=(level + 2 * torch.rand(4, 8),))
    verification = program.history[0].verification
    assert verification is not None
    assert verification.passed


@pytest.mark.xdist_group("llama")
def test_selection_by_type_knows_the_users_class_and_ours() -> None:
    for where in ("type:LlamaRMSNorm", "type:RMSNorm"):
        result = apply(shared("llama"), f"dyt{{where={where}}}", verify=False, share=True)
        assert len(inserted(result)) == 5


@pytest.mark.xdist_group("llama")
def test_two_alphas_by_two_passes() -> None:
    text = "dyt{alpha=0.8 where='*input_layernorm'},dyt{alpha=0.2 where='!*input_layernorm'}"
    result = apply(shared("llama"), text, verify=False, share=True)
    alphas = {path: round(float(layer.alpha.detach()), 2) for path, layer in inserted(result).items()}
    assert alphas == {
        "layers.0.input_layernorm": 0.8,
        "layers.0.post_attention_layernorm": 0.2,
        "layers.1.input_layernorm": 0.8,
        "layers.1.post_attention_layernorm": 0.2,
        "norm": 0.2,
    }
    assert len(result.history) == 2


@pytest.mark.xdist_group("gpt2")
def test_selector_without_a_match_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(RewriteError, match=r"where=h\.0\.ln1 matches none of the 5 places .*did you mean 'h\.0\.ln_1'"):
        apply(shared("gpt2"), "dyt{where=h.0.ln1}")


def test_alpha_in_text_and_back() -> None:
    step = DyT(alpha=0.8)
    assert step.text == "dyt{alpha=0.8}"
    layer = inserted(apply(single(nn.LayerNorm(DIM), 2, DIM)[1], step.text))["1"]
    assert torch.equal(layer.alpha.detach(), torch.tensor([0.8]))
    assert DyT().text == "dyt"


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    module = apply(shared("EncoderLayer"), "dyt", verify=False).module.train()
    (x,), _ = case("EncoderLayer").inputs(8, 12)
    target = torch.randn_like(x)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_reference_is_the_formula() -> None:
    weight, bias = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM))
    layer = DynamicTanh(weight, bias, (DIM,), 1, alpha=torch.full((1,), 0.3))
    x = torch.randn(2, DIM, 3, 3)
    assert torch.allclose(DyT().reference(None, layer, x), layer(x), atol=1e-6)


def test_reference_has_the_derivative_of_tanh_at_zero() -> None:
    """A norm behind a ReLU sees exact zeros, and torch's versions differ in the gradient of ``clamp`` at its bound."""
    u = torch.tensor([-0.0, 0.0, 1.0, -1.0, 40.0], dtype=torch.float64, requires_grad=True)
    y = DyT().reference(None, DynamicTanh(None, None, (5,), alpha=torch.ones(1)), u)
    (gradient,) = torch.autograd.grad(y.sum(), u)
    assert torch.equal(y[:2], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(gradient, 1 - torch.tanh(u).square().detach())


def test_proof_holds_where_a_norm_sees_exact_zeros() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.LayerNorm(DIM))
    verification = apply(capture(model, (torch.randn(4, 5, DIM),)), "dyt").history[-1].verification
    assert verification is not None
    assert verification.passed
