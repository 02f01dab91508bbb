"""The promise ESTIMATE: the forward to the bit, the gradient by the method's formula and near the true one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import ESTIMATE, SAME, Contract, Pass, VerificationError, apply
from rewrite.proof.part import Part

from . import models
from .steps import replacing, step

program = functools.cache(models.program)
PROMISE = Contract(SAME, ESTIMATE)


class Stepped(torch.autograd.Function):
    """GELU whose derivative is rounded to steps, or drawn, as ``how`` says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = how
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.how(slope(x)) * grads[0], None


def slope(x: Tensor) -> Tensor:
    """GELU's derivative: Phi(x) + x phi(x)."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5


def eighths(value: Tensor) -> Tensor:
    return (8 * value).round() / 8


def drawn(value: Tensor) -> Tensor:
    """Stochastic rounding to eighths: its mean is the value."""
    return (8 * value + torch.rand_like(value)).floor() / 8


class Coarse(nn.Module):
    def __init__(self, how: Any, forward: Any = None) -> None:
        super().__init__()
        self.how = how
        self.other = forward

    def forward(self, x: Tensor) -> Tensor:
        return Stepped.apply(x, self.how) if self.other is None else self.other(x)


def rounded(part: Part, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    return [eighths(slope(inputs[0])) * grads[0]]


def mean(part: Part, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    return [slope(inputs[0]) * grads[0]]


def coarse(how: Any, promise: Contract = PROMISE, forward: Any = None, **methods: Any) -> Pass:
    return step(replacing("blocks.0.act", lambda old: Coarse(how, forward)), promise, **methods)


WRONG: dict[str, tuple[Pass, str]] = {
    "another gradient than the formula": (coarse(lambda v: v, gradient=rounded), "gradient formula"),
    "a gradient scaled": (coarse(lambda v: 8 * eighths(v), gradient=rounded), "gradient formula"),
    "no formula": (coarse(eighths), "gradient formula"),
    "a gradient that is nan": (coarse(lambda v: v * torch.nan, gradient=rounded), "gradient formula"),
    "a drawn gradient with another mean": (coarse(lambda v: 1.5 * drawn(v), gradient=mean), "gradient formula"),
    "another forward": (
        coarse(eighths, forward=lambda x: F.gelu(x, approximate="tanh"), gradient=rounded),
        "same",
    ),
    "a forward off by a bit": (
        coarse(eighths, forward=lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)), gradient=rounded),
        "bit for bit",
    ),
    "worse than the bound": (
        coarse(eighths, Contract(SAME, ESTIMATE, bound=1e-3), gradient=rounded),
        "gradient",
    ),
    "a formula that is far from the truth": (
        coarse(lambda v: -v, gradient=lambda part, inputs, grads: [-slope(inputs[0]) * grads[0]]),
        "gradient",
    ),
}
RIGHT: dict[str, Pass] = {
    "rounded slopes": coarse(eighths, gradient=rounded),
    "drawn slopes": coarse(drawn, gradient=mean),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_the_promise_is_stopped_by_name(name: str, tmp_path: Path) -> None:
    wrong, check = WRONG[name]
    with pytest.raises(VerificationError) as info:
        apply(program(), wrong, crash_folder=tmp_path)
    assert f": {check}: " in str(info.value)


@pytest.mark.parametrize("name", RIGHT)
def test_right_twins_pass(name: str, tmp_path: Path) -> None:
    record = apply(program(), RIGHT[name], crash_folder=tmp_path).history[0]
    assert record.verification is not None
    assert record.verification.passed
