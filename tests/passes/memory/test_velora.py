"""velora: the models the kit tries it on, its direction and formula, bytes, and what stands in its way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import VerificationError
from rewrite.passes.memory.velora import VeLoRA, VeLoRALinear
from tests.captures import shared
from tests.passes.table import Row

ROWS = [
    Row("velora{width=8}", "gpt2", 8),
    Row("velora{width=64 where=layers.0.*}", "vit", 1, near_miss={"layers.0.mlp.fc1": "64 does not divide its 32 inputs"}),
    Row("velora", "Frozen", 0),
]

X = torch.randn(10, 24)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Dropout(0.1), nn.Linear(32, 48), nn.Dropout(0.1), nn.Linear(48, 4))


def gradients(module: nn.Module) -> list[Tensor]:
    module.eval()
    return list(torch.autograd.grad(module(X).square().sum(), list(module.parameters())))


def test_the_direction_is_the_normalized_mean_sub_token_of_the_data() -> None:
    model = net()
    data = [torch.randn(6, 24), torch.randn(6, 24)]
    program = rewrite.apply(model, "velora{width=8}", args=(X,), data=data)
    hidden = model[0](torch.cat(data))
    mean = hidden.unflatten(-1, (-1, 8)).mean((0, 1))
    assert torch.allclose(program.module.get_buffer("2.direction"), mean / mean.norm(), atol=1e-5)


def test_the_gradient_is_projected() -> None:
    """dW P with P = v vᵀ in blocks; the gradients of input and bias are exact."""
    model = net().double()
    program = rewrite.apply(model, "velora{width=8}", args=(X.double(),))
    layer: Any = program.module.get_submodule("4")
    assert type(layer) is VeLoRALinear
    x, dy = torch.randn(7, 48, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64)
    dx, dw, db = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dy)
    v = layer.direction
    projection = torch.block_diag(*[v[:, None] * v] * 6)
    assert torch.allclose(dw, dy.t() @ x @ projection)
    assert torch.allclose(dx, dy @ layer.weight)
    assert torch.allclose(db, dy.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_for_each_width_is_kept(dtype: torch.dtype) -> None:
    model, x = net().to(dtype), X.to(dtype)
    program = rewrite.apply(model, "velora{width=8}", args=(x,))
    before, after = rewrite.memory(model, (x,)).bytes, rewrite.memory(program).bytes
    assert before - after == 10 * (32 + 48) * 7 // 8 * dtype.itemsize


@dataclass(frozen=True)
class Doubled(VeLoRA):
    """Says that the gradient is twice what it is."""

    def gradient(self, *given: Any) -> Any:
        inputs, parameters = super().gradient(*given)
        return inputs, {name: 2 * value for name, value in parameters.items()}


def test_a_wrong_formula_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="gradient formula"):
        rewrite.apply(net(), [Doubled(width=8)], args=(X,), crash_folder=tmp_path)


def test_what_would_change_its_parts_is_refused_or_left_alone() -> None:
    program = rewrite.apply(shared("PreNormDecoder"), "velora{width=4}")
    with pytest.raises(rewrite.RewriteError, match=r"ffn cannot grow .*velora keeps its input in parts"):
        rewrite.apply(program, "expand{ffn=2x}")
    (record,) = rewrite.apply(program, "fold-affine").history[1:]
    reasons = {skip.path: skip.reason for skip in record.skipped}
    assert reasons["layers.0.norm"] == "layers.0.qkv reads it, which is no linear layer or convolution"


def test_masks_do_not_stop_a_fold_as_gradients_of_their_own_do() -> None:
    folded = rewrite.apply(shared("PreNormDecoder"), "random-prune{sparsity=0.5},fold-affine").history[-1]
    assert "layers.0.norm" not in {skip.path for skip in folded.skipped}
    assert folded.changes
