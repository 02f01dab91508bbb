"""Models that were run before they are captured, and what their code keeps or draws beside its parameters."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import Tensor, nn

from rewrite import capture, load, save
from tests.compare import CAPTURED, differences, observe
from tests.models import zoo

DIM = 4


@pytest.mark.parametrize("name", zoo.DEVELOPMENT)
def test_model_that_was_run_in_both_modes_is_captured_as_it_is(name: str) -> None:
    case = next(c for c in zoo.development_cases() if c.name == name)
    model, (args, kwargs) = case.build(), case.inputs(*CAPTURED)
    if "use_cache" in kwargs or hasattr(getattr(model, "config", None), "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    for training in (True, False):
        model.train(training)(*args, **kwargs)
    module = capture(model, args, kwargs).clone().module
    for training in (False, True):
        assert differences(observe(model, args, kwargs, train=training), observe(module, args, kwargs, train=training)) == []


class Cached(nn.Module):
    """Evaluation keeps a table in a plain dict; with `clears`, a return to training drops it (LeViT's attention biases)."""

    def __init__(self, clears: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, DIM))
        self.kept: dict[str, Tensor] = {}
        self.clears = clears

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode and self.clears:
            self.kept = {}
        return self

    def biases(self) -> Tensor:
        if self.training:
            return self.table.sum(0)
        if "table" not in self.kept:
            self.kept["table"] = self.table.sum(0).detach()
        return self.kept["table"]

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(2.0) + self.biases()


@pytest.mark.parametrize("clears", [True, False])
def test_what_evaluation_caches_in_a_dict(clears: bool) -> None:
    model, x = Cached(clears), torch.randn(2, DIM)
    model.eval()(x)
    module = capture(model, (x,)).module
    for training in (True, False):
        assert torch.equal(model.train(training)(x), module.train(training)(x))
    with torch.no_grad():
        model.table += 1  # shared with the module
    assert torch.equal(model.train()(x), module.train()(x))
    assert torch.equal(model.eval()(x), module.eval()(x))


class CountedConstants(nn.Module):
    """Training makes one more constant than evaluation, in front: the same number stands for another one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.tensor([2.0, 3.0, 5.0, 7.0])
        return x + torch.tensor([11.0, 13.0, 17.0, 19.0]) - torch.tensor(0.1)


def test_constants_of_one_mode_are_not_taken_for_those_of_the_other(tmp_path: object) -> None:
    model, x = CountedConstants(), torch.randn(2, DIM)
    program = capture(model, (x,))
    save(program, f"{tmp_path}/model.pt2")
    for module in (program.module, load(f"{tmp_path}/model.pt2").module):
        for training in (True, False):
            assert torch.equal(model.train(training)(x), module.train(training)(x))


class Doubled(torch.autograd.Function):
    """x, with twice its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class FunctionOfOneMode(nn.Module):
    """A custom function that one mode alone calls, and one under `no_grad`."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.no_grad():
            z = Doubled.apply(y).sigmoid()
        if self.training is self.mode:
            y = Doubled.apply(y)
        return y * z


@pytest.mark.parametrize("mode", [True, False])
def test_custom_functions_inside_regions_keep_their_backward(mode: bool) -> None:
    model, x = FunctionOfOneMode(mode), torch.randn(2, DIM)
    module = capture(model, (x,)).module
    for training in (True, False):
        assert differences(observe(model, (x,), {}, train=training), observe(module, (x,), {}, train=training)) == []


class Masked(nn.Module):
    """Drops random features by numpy in training, as SpecAugment does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(numpy.random.rand(DIM) > 0.5) if self.training else x


def test_draws_outside_of_torch_are_noted_and_leave_the_generators_alone() -> None:
    before = repr(numpy.random.get_state()), random.getstate()
    program = capture(Masked(), (torch.randn(2, DIM),))
    assert any("draws numbers with numpy" in note for note in program.origin.notes)
    assert (repr(numpy.random.get_state()), random.getstate()) == before
