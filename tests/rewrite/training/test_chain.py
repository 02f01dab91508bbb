"""A forward without a backward leaves nothing behind, and what hooks leave as it is takes gradients of gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import rewrite
from rewrite.training.inventory import inventory
from tests.captures import shared

STEPS = (
    "compress-activations",
    "compress-activations{min_size=1000000}",
    "offload",
    "recompute{where='re:norm|LayerNorm|act'}",
    "recompute,compress-activations",
    "fit-memory{budget=0.5}",
)
MEASURED: dict[str, Callable[[rewrite.Program], object]] = {"memory": rewrite.memory, "inventory": inventory}


def tensors() -> int:
    gc.collect()
    return sum(type(each) is torch.Tensor for each in gc.get_objects())


@pytest.mark.parametrize("step", STEPS)
def test_a_forward_without_a_backward_is_forgotten(step: str) -> None:
    program = rewrite.apply(shared("bert"), step, verify=False)
    module = program.module.train()
    module(*program.example_args, **program.example_kwargs)
    before = tensors()
    for _ in range(2):
        module(*program.example_args, **program.example_kwargs)
    assert tensors() <= before


@pytest.mark.parametrize("kind", MEASURED)
def test_what_was_measured_is_forgotten(kind: str) -> None:
    program = shared("bert")
    MEASURED[kind](program)
    before = tensors()
    MEASURED[kind](program)
    assert tensors() <= before


@pytest.mark.parametrize("step", ["compress-activations{min_size=1000000}", "offload"])
def test_gradients_of_gradients(step: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), nn.Softmax(-1)), torch.randn(3, 4)
    found = []
    for module in (model, rewrite.apply(model, step, args=(x,), verify=False).module):
        (first,) = torch.autograd.grad(module(x).square().sum(), module.get_parameter("0.weight"), create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [*module.parameters()]))
    assert all(map(torch.equal, *found))
