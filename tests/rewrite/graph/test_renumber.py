"""Blocks under other numbers, and copies of blocks: the names, the function, and what the proof makes of wrong ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rewrite import SAME, Contract, Pass, RewriteError, apply
from rewrite.analysis.branches import branches
from rewrite.graph.renumber import renamed, renumbered
from rewrite.pipeline.context import Context
from rewrite.pipeline.crash import VerificationError
from tests.captures import capture


class Block(nn.Module):
    """x + up(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.scale * self.up(self.norm(x)).relu())


class Net(nn.Module):
    """Two blocks on a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def program():
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(2, 5, 4),))


@dataclass(frozen=True)
class Insert(Pass):
    """A copy of the first block behind it, whose output is times ``factor``."""

    name = "insert"
    factor: float = 0.0
    swapped: bool = False

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program, context: Context) -> None:
        first = branches(program)[0]
        context.edit.renumber(
            {"blocks.1": "blocks.2"} if not self.swapped else {"blocks.0": "blocks.1", "blocks.1": "blocks.0"}
        )
        if not self.swapped:
            context.edit.repeat("blocks.0", "blocks.1", first.starts[0], first.addition)
            for name in ("blocks.1.down.weight", "blocks.1.down.bias"):
                context.edit.set_parameter(name, self.factor * program.module.get_parameter(name).detach())


def test_a_path_below_a_renumbered_module() -> None:
    names = {"a.1": "a.2", "a.10": "a.11"}
    assert [renamed(p, names) for p in ("a.1", "a.1.b", "a.10.c", "a.0", "b.a.1")] == [
        "a.2",
        "a.2.b",
        "a.11.c",
        "a.0",
        "b.a.1",
    ]


def test_a_renumbered_program_is_the_same_function() -> None:
    given = program()
    made = renumbered(given, {"blocks.1": "blocks.3"})
    (x,) = given.example_args
    assert torch.equal(made.module(x), given.module(x))
    assert [name for name, _ in made.module.blocks.named_children()] == ["0", "3"]
    assert [name for name, _ in given.module.blocks.named_children()] == ["0", "1"]


def test_a_copied_block_is_a_block_of_its_own() -> None:
    given = program()
    made = apply(given, [Insert()])
    assert [str(n.target) for n, _ in made.layers() if "up" in str(n.target)] == [f"blocks.{i}.up" for i in range(3)]
    assert made.module.blocks.get_submodule("1").up.weight is not made.module.blocks.get_submodule("0").up.weight
    assert {b.block for b in branches(made)} == {"blocks.0", "blocks.1", "blocks.2"}
    checks = {check.name: check.detail for check in made.history[-1].verification.checks}
    assert checks["same"].startswith("outputs, state and gradients: 1 parts")


def test_a_block_that_adds_something_is_no_identity() -> None:
    with pytest.raises(VerificationError, match="same"):
        apply(program(), [Insert(factor=1e-4)])


def test_blocks_in_another_order_are_only_called_otherwise() -> None:
    """Numbers are names: which block runs first is in the graph."""
    made = apply(program(), [Insert(swapped=True)])
    assert [str(n.target) for n, _ in made.layers() if "up" in str(n.target)] == ["blocks.1.up", "blocks.0.up"]


def test_two_modules_of_one_number() -> None:
    with pytest.raises(RewriteError, match="two modules of blocks would be called the same"):
        renumbered(program(), {"blocks.0": "blocks.1"})
