"""The promises NEW and CLOSE: the formula, its independence, the bound, and the frame around them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import CLOSE, NEW, Contract, Pass, Program, VerificationError, apply
from rewrite.pipeline.context import Context
from rewrite.pipeline.inserting import insert_behind
from tests.captures import capture

from . import models
from .steps import OTHER, Act, Action, Cut, replacing, step

program = functools.cache(models.program)


class Square(nn.Module):
    """gain * x^2 where ``function`` says nothing else."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.5))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * x if self.function is None else self.function(self, x)


def square(old: Any, new: Square, x: Tensor) -> Tensor:
    return new.gain * x.square()


def with_square(function: Any = None) -> Action:
    return replacing("blocks.0.act", lambda old: Square(function))


def also(action: Action, extra: Action) -> Action:
    def both(program: Program, context: Context) -> None:
        action(program, context)
        extra(program, context)

    return both


def other_eps(program: Program, context: Context) -> None:
    program.module.get_submodule("blocks.1.norm").eps = 1e-2


def moved_bias(program: Program, context: Context) -> None:
    program.module.head.bias = nn.Parameter(program.module.head.bias.detach() + 1)


def call(old: Any, new: Square, x: Tensor) -> Tensor:
    return new(x)


def call_class(old: Any, new: Square, x: Tensor) -> Tensor:
    return type(new).forward(new, x)


def only(condition: bool, value: Tensor, other: Tensor) -> Tensor:
    return other if condition else value


WRONG: dict[str, tuple[Pass, str]] = {
    "another function than the formula": (
        step(with_square(lambda layer, x: layer.gain * x), OTHER, reference=square),
        "formula",
    ),
    "another gradient": (
        step(with_square(lambda layer, x: Cut.apply(layer.gain * x * x, 1.01)), OTHER, reference=square),
        "formula",
    ),
    "a parameter that gets no gradient": (
        step(with_square(lambda layer, x: layer.gain.detach() * x * x), OTHER, reference=square),
        "formula",
    ),
    "a constant in place of a parameter": (
        step(with_square(lambda layer, x: 0.5 * x * x), OTHER, reference=square),
        "formula",
    ),
    "another function in training": (
        step(with_square(lambda layer, x: layer.gain * (x if layer.training else x * x)), OTHER, reference=square),
        "formula",
    ),
    "another function for large values": (
        step(with_square(lambda layer, x: layer.gain * (x * x).clamp(max=900)), OTHER, reference=square),
        "formula",
    ),
    "another function in float32": (
        step(with_square(lambda layer, x: only(x.dtype is torch.float32, layer.gain * x * x, x)), OTHER, reference=square),
        "formula",
    ),
    "a formula that calls the layer": (step(with_square(), OTHER, reference=call), "formula"),
    "a formula that calls the layer's class": (step(with_square(), OTHER, reference=call_class), "formula"),
    "no formula": (step(with_square(), OTHER), "formula"),
    "nan": (step(with_square(lambda layer, x: layer.gain * x * x * torch.nan), OTHER, reference=square), "formula"),
    "another layer touched": (step(also(with_square(), other_eps), OTHER, reference=square), "frame"),
    "another parameter touched": (step(also(with_square(), moved_bias), OTHER, reference=square), "kept"),
    "further than the bound": (
        step(with_square(), Contract(CLOSE, NEW, bound=0.01), reference=square),
        "close",
    ),
}


def nearly(old: Any, new: Act, x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def approximate(x: Tensor, y: Tensor, layer: Act) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


RIGHT: dict[str, Pass] = {
    "a new layer by its formula": step(with_square(), OTHER, reference=square),
    "an approximation within its bound": step(
        replacing("blocks.0.act", lambda old: Act(approximate)), Contract(CLOSE, NEW, bound=0.01), reference=nearly
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_the_promise_is_stopped_by_name(name: str, tmp_path: Path) -> None:
    wrong, check = WRONG[name]
    with pytest.raises(VerificationError) as info:
        apply(program(), wrong, crash_folder=tmp_path)
    assert f": {check}" in str(info.value)


@pytest.mark.parametrize("name", RIGHT)
def test_right_twins_pass(name: str, tmp_path: Path) -> None:
    record = apply(program(), RIGHT[name], crash_folder=tmp_path).history[0]
    assert record.verification is not None
    assert record.verification.passed


class InPlace(nn.Module):
    """a(x), to which b(x) is added in place: no value between the two can be held."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        return y.sin()


@pytest.mark.parametrize(("function", "right"), [(None, True), (lambda layer, x: layer.gain * x.abs() * x, False)])
def test_a_layer_beside_what_writes_in_place_is_held_by_its_own_formula(function: Any, right: bool) -> None:
    def action(program: Program, context: Context) -> None:
        insert_behind(context.edit, next(n for n, _ in program.layers() if n.target == "a"), "square", Square(function))

    before = capture(InPlace(), (torch.randn(3, 4),))
    probe = step(action, OTHER, reference=square)
    if right:
        assert apply(before, probe).history[-1].changed
    else:
        with pytest.raises(VerificationError, match="formula"):
            apply(before, probe)


def test_the_rounding_of_a_sum_over_many_positions_breaks_no_contract() -> None:
    model, x = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 2)), torch.randn(2, 5000, 16)
    for seed in range(3):
        assert apply(model, "rep-batchnorm", args=(x,), seed=seed).history[-1].changed


class TwoActivations(nn.Module):
    """act(x + f(act(W x))), both written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(models.DIM, models.DIM), nn.Linear(models.DIM, models.DIM)
        self.act, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.act2(x + self.second(x))


def test_what_no_longer_trains_is_stopped(tmp_path: Path) -> None:
    """Without its branch the last activation writes into the result of the first, which that needs for its gradient."""

    def drop(program: Program, context: Context) -> None:
        addition = next(n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor)
        context.edit.rewire(addition, addition.args[0])
        context.edit.remove_unused([addition, addition.args[1]], "second", "dropped")
        context.edit.sweep()

    x, close = torch.randn(3, models.DIM), Contract(CLOSE, NEW, bound=9.0)
    with pytest.raises(VerificationError, match="trains: a step of training fails where it did not before"):
        apply(TwoActivations(), [step(drop, close)], args=(x,), crash_folder=tmp_path)
    evaluation = Contract(CLOSE, NEW, bound=9.0, evaluation_only=True)
    assert apply(TwoActivations(), [step(drop, evaluation)], args=(x,)).history[-1].verification


def test_a_formula_may_not_call_its_layer_where_one_of_its_class_stood_before(tmp_path: Path) -> None:
    before = apply(program(), [step(with_square(), OTHER, reference=square)])
    again = step(with_square(lambda layer, x: layer.gain * x), OTHER, reference=call)
    with pytest.raises(VerificationError, match="the formula calls Square, the layer that it is to judge"):
        apply(before, [again], crash_folder=tmp_path)
