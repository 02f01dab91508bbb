"""Functions that remember: no fake tensor stays with them, neither for the program nor for the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewrite import capture


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    cached = functools.lru_cache(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return cached(*args)

    return wrapper


@remembered
def steps(count: int) -> Tensor:
    return torch.arange(count) / count


class Positions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + steps(x.shape[-1])


def test_a_cached_value_is_computed_in_the_program_and_not_left_behind() -> None:
    model, x = Positions(), torch.randn(3, 4)
    program = capture(model, (x,))
    assert torch.equal(program.module(x), model(x))
    assert not list(program.module.buffers())


@functools.lru_cache
def scale(count: int) -> Tensor:
    return torch.full((), 1.0 / count)


class Scaled(nn.Module):
    @functools.lru_cache  # noqa: B019
    def offset(self, count: int) -> Tensor:
        return torch.zeros(count)

    def forward(self, x: Tensor) -> Tensor:
        return x * scale(x.shape[-1]) + self.offset(x.shape[-1])


def test_what_a_function_remembers_stays_the_users() -> None:
    model, x, kept = Scaled(), torch.randn(3, 4), scale(4)
    held = scale.cache_info(), Scaled.offset.cache_info()
    program = capture(model, (x,))
    assert torch.equal(program.module(x), model(x))
    assert not list(program.module.buffers())
    assert scale(4) is kept
    assert scale.cache_info().misses == held[0].misses
    assert held[1].currsize == 0
