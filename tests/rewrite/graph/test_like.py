"""A layer made like another: what it takes over, and what it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite.graph.like import like


class Scaled(nn.Linear):
    factor: float
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale * self.factor


def test_it_has_the_very_tensors_attributes_and_mode() -> None:
    old = nn.Linear(3, 4, dtype=torch.float64).eval()
    old.weight.requires_grad_(False)
    made = like(old, Scaled, factor=2.0, scale=torch.ones(4))
    assert made.weight is old.weight
    assert (made.in_features, made.out_features, made.training) == (3, 4, False)
    assert list(made.state_dict()) == ["weight", "bias", "scale"]
    x = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(made(x), 2 * old(x))
    assert not hasattr(old, "scale")


def test_what_is_given_stands_instead_of_what_was_there() -> None:
    old = nn.Linear(3, 4)
    made = like(old, Scaled, factor=1.0, bias=None, scale=nn.Parameter(torch.ones(4)), weight=torch.zeros(4, 3))
    assert made.bias is None
    assert [name for name, _ in made.named_parameters()] == ["scale"]
    assert [name for name, _ in made.named_buffers()] == ["weight"]
    assert isinstance(old.weight, nn.Parameter)


def test_hooks_stay_where_they_were_and_children_are_shared() -> None:
    old = nn.Sequential(nn.ReLU())
    old.register_forward_hook(lambda module, args, output: output + 1)
    made = like(old.eval(), nn.Sequential)
    assert made[0] is old[0]
    assert not made._forward_hooks
