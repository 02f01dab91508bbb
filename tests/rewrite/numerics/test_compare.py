"""verify: two programs or modules held against each other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply, verify
from rewrite.numerics.compare import Run, difference, relative_error
from tests.captures import capture, shared
from tests.compare import CAPTURED, case, model_of

DIM = 8


@pytest.mark.parametrize(
    "name",
    [
        "EncoderLayer",
        "Recurrent",
        "FrozenBatchNorm",
        "TrainingBranchInRoot",
        "bert",
        "RMSNormSpellings",
        "WeightNormByHook",
        "AliasedOutputs",
    ],
)
def test_program_is_the_same_as_its_copy(name: str) -> None:
    result = verify(shared(name), shared(name).clone())
    assert result.same
    assert result.bitwise
    assert str(result).startswith("same\n")


@pytest.mark.parametrize("name", ["FrozenBatchNorm", "RMSNormSpellings", "DtypeLiterals", "CalledTwice", "vit"])
def test_program_is_the_same_as_its_model(name: str) -> None:
    assert verify(shared(name), model_of(name)).same
    assert verify(model_of(name), model_of(name), *case(name).inputs(*CAPTURED))


@pytest.mark.xdist_group("EncoderLayer")
def test_difference_is_found_and_named() -> None:
    program = shared("EncoderLayer")
    other = program.clone()
    with torch.no_grad():
        other.module.get_submodule("layer.linear1").weight.mul_(1 + 1e-6)
    result = verify(program, other)
    assert not result
    assert not result.same
    assert "DIFFERENT" in str(result)
    assert result.exact["eval"].outputs > 1e-10
    assert set(result.exact) == {"eval", "train"}


def test_rounding_alone_is_the_same_but_not_bitwise() -> None:
    class Reordered(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return (x.unsqueeze(-2) * self.weight).flip(-1).cumsum(-1)[..., -1] + self.bias

    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    result = verify(linear, Reordered(linear), (torch.randn(16, 64),))
    assert result.same
    assert not result.bitwise


def test_wrong_gradient_alone_is_found() -> None:
    class Detached(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.detach(), self.bias)

    linear = nn.Linear(DIM, DIM)
    result = verify(linear, Detached(linear), (torch.randn(2, DIM),))
    assert result.exact["eval"].outputs == 0
    assert result.exact["eval"].worst_gradient == "weight"
    assert not result


def test_wrong_buffer_alone_is_found() -> None:
    a = nn.BatchNorm1d(DIM)
    b = copy.deepcopy(a)
    b.momentum = 0.2
    result = verify(a, b, (torch.randn(4, DIM),))
    assert result.exact["train"].outputs == 0
    assert result.exact["train"].buffers > 0
    assert not result


@pytest.mark.parametrize(
    "other", [lambda x: (x, x), lambda x: x.sum(-1), lambda x: x.long()], ids=["number", "shape", "dtype"]
)
def test_outputs_of_another_kind_are_a_problem(other: object) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return other(x)  # type: ignore[operator,no-any-return]

    result = verify(nn.Identity(), Model(), (torch.randn(2, 3),))
    assert not result
    assert result.exact["eval"].problem


@pytest.mark.xdist_group("EncoderLayer")
def test_a_rewritten_program_is_different() -> None:
    program = shared("EncoderLayer")
    assert not verify(program, apply(program, "dyt", verify=False))


def test_inputs_are_needed() -> None:
    with pytest.raises(RewriteError, match="verify needs inputs"):
        verify(nn.Identity(), nn.Identity())


def test_meta_cannot_be_verified() -> None:
    with torch.device("meta"):
        program = capture(nn.Linear(DIM, DIM), (torch.randn(2, DIM),))
    with pytest.raises(RewriteError, match="nothing can be verified on the meta device"):
        verify(program, program)


def test_relative_error() -> None:
    a = torch.tensor([1.0, 2.0])
    assert relative_error(a, a) == 0
    assert relative_error(a, torch.tensor([1.0, 2.5])) == 0.25
    assert relative_error(a, torch.tensor([1.0])) == float("inf")
    assert relative_error(a, torch.tensor([1.0, float("nan")])) == float("inf")
    assert relative_error(torch.tensor([1]), torch.tensor([2])) == float("inf")
    assert relative_error(torch.zeros(2), torch.ones(2)) == 1
    assert relative_error(torch.empty(0), torch.empty(0)) == 0


def test_infinities_must_be_the_same_ones() -> None:
    inf = torch.tensor([float("inf"), 1.0])
    assert relative_error(inf, inf.clone()) == 0
    assert relative_error(inf, torch.tensor([float("-inf"), 1.0])) == float("inf")
    assert relative_error(inf, torch.tensor([float("nan"), 1.0])) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_values_hide_nothing(dtype: torch.dtype) -> None:
    low = torch.finfo(dtype).min
    scores = torch.tensor([1.0, 2.0, low, low + 3.0], dtype=torch.float64)
    assert relative_error(scores, scores + torch.tensor([0.0, 1e-6, 0.0, 0.0], dtype=torch.float64)) == pytest.approx(5e-7)
    assert relative_error(scores, scores * torch.tensor([1.0, 1.0, 1.5, 1.0], dtype=torch.float64)) == pytest.approx(0.5)
    mask = torch.tensor([0.0, low], dtype=torch.float64)
    assert relative_error(mask, mask + torch.tensor([1e-3, 0.0], dtype=torch.float64)) == pytest.approx(1e-3)


def test_masks_of_two_sizes_hide_nothing() -> None:
    values = torch.tensor([1.0, 100.0, -1e9, torch.finfo(torch.float32).min], dtype=torch.float64)
    for place, error in ((1, 0.5), (2, 0.25), (3, 0.125)):
        wrong = values.clone()
        wrong[place] *= 1 + error
        assert relative_error(values, wrong) == pytest.approx(error)


def test_what_explodes_is_no_mask() -> None:
    """Large values of every size, and ReLU's zeros: one that rounding puts on the other side of the kink is near."""
    values = torch.tensor([0.0, 2e5, 3e6, 4e7, 7e8], dtype=torch.float64)
    assert relative_error(values, values + torch.tensor([7e5, 0, 0, 0, 0])) == pytest.approx(1e-3)


def test_a_gradient_that_is_rounding_alone_counts_by_the_largest() -> None:
    """As for a key's bias, zero but for rounding; one that is wrong by its own size still counts where it matters."""
    large, tiny = torch.ones(3), torch.full((3,), 1e-18)
    one, other = (Run((), {"weight": large, "bias": g}, {}) for g in (tiny, -tiny))
    assert difference(one, other).gradients <= 1e-14
    small = torch.full((3,), 1e-4)
    one, other = (Run((), {"weight": large, "bias": g}, {}) for g in (small, -small))
    assert difference(one, other).gradients == pytest.approx(0.2)
