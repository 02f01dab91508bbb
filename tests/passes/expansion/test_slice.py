"""slice: the models the kit tries it on, the units by hand, nested slices, what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, RewriteError, apply
from tests.captures import capture
from tests.passes.table import Row

ROWS = [
    Row("slice{ffn=0.5}", "gpt2", 10, again=10),
    Row("slice{ffn=0.5 where=ffn.1}", "PreNormDecoder", 5, near_miss={"ffn.0": "not selected"}, again=5),
    Row("slice", "resnet18", 0),
]


class Block(nn.Module):
    """x + down(act(up(norm(x)) gate(norm(x))))."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.down, self.last = nn.Linear(8, 6), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.last(nn.functional.silu(self.gate(y)) * self.up(y)))


def block(last: nn.Module | None = None) -> Program:
    torch.manual_seed(0)
    return capture(Block(last or nn.Identity()), (torch.randn(3, 4, 6),))


def test_the_units_by_hand() -> None:
    before = block()
    old = dict(before.module.named_parameters())
    rank = old["up.weight"].norm(dim=1) * old["gate.weight"].norm(dim=1) * old["down.weight"].norm(dim=0)
    kept = rank.argsort(descending=True)[:3]
    result = apply(before, "slice{ffn=0.375}")
    new = dict(result.module.named_parameters())
    assert torch.equal(new["up.weight"], old["up.weight"][kept])
    assert torch.equal(new["gate.bias"], old["gate.bias"][kept])
    assert torch.equal(new["down.weight"], old["down.weight"][:, kept])
    assert torch.equal(new["down.bias"], old["down.bias"])
    assert [step.contract for step in result.history[-1].steps] == [
        "forward new, backward new",
        "forward same, backward new",
    ]


def test_slices_are_nested() -> None:
    large, small = (apply(block(), f"slice{{ffn={share}}}").module.get_parameter("up.weight") for share in (0.75, 0.25))
    assert torch.equal(large[: len(small)], small)
    assert torch.equal(apply(apply(block(), "slice{ffn=0.5}"), "slice{ffn=0.5}").module.get_parameter("up.weight"), small)


def test_what_is_left_alone_and_refused() -> None:
    record = apply(block(nn.LayerNorm(8)), "slice").history[-1]
    assert record.changes == ()
    assert "meet in norm" in record.skipped[0].reason
    with pytest.raises(RewriteError, match="below 1"):
        apply(block(), "slice{ffn=1}")
    with pytest.raises(RewriteError, match="matches none"):
        apply(block(), "slice{where=heads.*}")
