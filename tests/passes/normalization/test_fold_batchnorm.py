"""fold-batchnorm: the models the kit tries it on, the folded layers by hand, and each reason to leave a norm alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, apply
from tests.passes.table import Row

ROWS = [
    Row("fold-batchnorm", "resnet18", 56),
    Row("fold-batchnorm", "vit", 0),
    Row("fold-batchnorm", "gpt2", 0),
]


def trained(model: nn.Module) -> nn.Module:
    """With statistics and parameters away from 0 and 1."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape))
    return model.eval()


def folded(model: nn.Module, x: Tensor) -> tuple[Program, dict[str, str]]:
    result = apply(trained(model), "fold-batchnorm", args=(x,))
    assert torch.allclose(result.module.eval()(x), model(x), atol=1e-5)
    return result, {skip.path: skip.reason for skip in result.history[-1].skipped}


def norms(program: Program) -> list[str]:
    return [str(n.target) for n, layer in program.layers() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


PAIRS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "convolution": ([nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()], (2, 3, 5, 5)),
    "grouped convolution": ([nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)], (2, 4, 5, 5)),
    "convolution of one dimension": ([nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6, affine=False)], (2, 3, 7)),
    "linear": ([nn.Linear(4, 6), nn.BatchNorm1d(6)], (5, 4)),
    "behind, linear": ([nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3)], (5, 4)),
    "behind, convolution without padding": ([nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False)], (2, 3, 5, 5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_norm_beside_a_layer_that_takes_it(name: str) -> None:
    layers, shape = PAIRS[name]
    result, skipped = folded(nn.Sequential(*layers), torch.randn(shape))
    assert norms(result) == []
    assert skipped == {}
    assert not any("running" in key for key in result.module.state_dict())


@pytest.mark.parametrize("seed", [20, 27, 39])
def test_a_relu_within_rounding_of_its_kink_is_no_fault(seed: int) -> None:
    """In bfloat16 the folded form rounds an element to the other side, at these seeds among others."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    result, _ = folded(nn.Sequential(*layers), torch.randn(2, 3, 5, 5))
    assert norms(result) == []


def test_the_weight_by_hand() -> None:
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    result, _ = folded(nn.Sequential(conv, norm), torch.randn(2, 3, 4, 4))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    state: Any = result.module.state_dict()
    assert torch.allclose(state["0.weight"], conv.weight * scale.reshape(-1, 1, 1, 1), atol=1e-6)
    assert torch.allclose(state["0.bias"], (conv.bias - norm.running_mean) * scale + norm.bias, atol=1e-6)


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


@pytest.mark.parametrize(
    ("model", "path", "words"),
    [
        (Read(), "norm", "conv is read elsewhere too"),
        (Called(), "norm", "conv, which writes it, is called elsewhere too"),
        (
            nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)),
            "1",
            "0 writes it, which is no convolution",
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), None, ""),
    ],
)
def test_norms_that_stay_have_their_reason(model: nn.Module, path: str | None, words: str) -> None:
    result, skipped = folded(model, torch.randn(2, 3, 5, 5))
    if path is None:
        assert not result.history[-1].changed
        return
    assert words in skipped[path]
    assert norms(result) == [path]


def test_training_is_said_to_be_another() -> None:
    result, _ = folded(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4))
    assert result.history[-1].contract.endswith("evaluation only")
    assert result.history[-1].warnings == ("1 norms no longer take statistics in training: fold a model that is trained",)


class Skipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def test_a_norm_of_an_input_that_a_skip_reads_too() -> None:
    """Its fold rewires to the input itself, whose value no proof may doubt."""
    result, _ = folded(Skipped(), torch.randn(5, 4))
    assert norms(result) == []
