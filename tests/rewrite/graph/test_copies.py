"""A copied module is what `copy.deepcopy` makes of it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rewrite.graph.copies import copied


class Sharing(nn.Module):
    """Two layers that share a dict, a list, a weight, and a child; one attribute is a method of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.again = self.a
        self.a.cache = self.b.cache = {"seen": [1]}
        self.a.calls = self.b.calls = []
        self.sizes = {3: "x"}
        self.call = self.forward
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a.calls.append(len(x))
        return self.b(self.a(x)) * self.mask


class Own(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: dict) -> Own:
        made = Own(self.in_features, self.out_features)
        made.marked = True
        return made


def test_what_is_shared_stays_shared_and_is_no_one_elses() -> None:
    model = Sharing().train(False)
    made = copied(model, {})
    assert made.b.weight is made.a.weight
    assert made.a.weight is not model.a.weight
    assert made.again is made.a
    assert made.a.cache is made.b.cache
    assert made.a.calls is made.b.calls
    assert made.a.cache == model.a.cache
    assert made.a.cache is not model.a.cache
    assert made.call.__self__ is made
    assert made.sizes == model.sizes
    assert not made.a.training
    assert list(made.state_dict()) == list(model.state_dict())
    assert torch.equal(made(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert (made.a.calls, model.a.calls) == ([1], [1])
    assert vars(made).keys() == vars(copy.deepcopy(model)).keys()


def test_the_memo_gives_tensors_and_modules() -> None:
    model = Sharing()
    made = copied(model, {id(model.a.weight): model.a.weight, id(model.b): model.b})
    assert made.a.weight is model.a.weight
    assert made.b is model.b


def test_a_class_of_its_own_mind_is_asked() -> None:
    assert copied(nn.Sequential(Own(2, 2)), {})[0].marked
