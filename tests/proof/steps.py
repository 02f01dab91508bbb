"""Passes made of one function each, and the layers that wrong ones insert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import NEW, SAME, Contract, Pass, Program
from rewrite.pipeline.context import Context
from rewrite.torch_private import FakeTensor

Action = Callable[[Program, Context], None]


def step(action: Action, contract: Contract | None = None, **methods: Any) -> Pass:
    """A pass that does what ``action`` does, with a contract (SAME in both directions) and methods of its own."""
    promised = contract or Contract(SAME, SAME)

    class Probe(Pass):
        name: ClassVar[str] = "probe"

        def contract(self) -> Contract:
            return promised

        def run(self, program: Program, context: Context) -> None:
            action(program, context)

    for name, method in methods.items():
        setattr(Probe, name, lambda self, *args, method=method: method(*args))
    return dataclass(frozen=True)(Probe)()


def replacing(path: str, make: Callable[[Any], nn.Module]) -> Action:
    """Replace the layer at a path by what ``make`` makes of it."""

    def action(program: Program, context: Context) -> None:
        context.edit.replace_layer(path, make(program.module.get_submodule(path)))

    return action


class Act(nn.Module):
    """GELU, but for what ``function`` does with x, the true value y and the layer."""

    def __init__(self, function: Callable[[Tensor, Tensor, Act], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            self.calls += 1
        return self.function(x, F.gelu(x), self)


def acting(function: Callable[[Tensor, Tensor, Act], Tensor]) -> Action:
    """Replace the first block's GELU by an ``Act``."""
    return replacing("blocks.0.act", lambda old: Act(function))


class Like(nn.Module):
    """A linear layer that computes with what ``weight_of`` makes of its weight, or of a copy made at the start."""

    def __init__(self, old: nn.Linear, weight_of: Callable[[Like], Tensor]) -> None:
        super().__init__()
        self.weight = old.weight
        self.bias = old.bias
        self.register_buffer("baked", old.weight.detach().clone())
        self.weight_of = weight_of

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_of(self), self.bias)


class Cut(torch.autograd.Function):
    """x, with a gradient that is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.scale * grads[0], None


OTHER = Contract(NEW, NEW)
