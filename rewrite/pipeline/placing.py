"""Layers put at residual branches: behind what a branch adds, behind a sum, before one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.writers import Writers
from rewrite.analysis.writes import Writes

from .pass_ import Pass, option
from .select import Selector

if TYPE_CHECKING:
    import torch

    from rewrite.graph.program import Program

    from .context import Context


class Spot(NamedTuple):
    """A branch, as a selector chooses it: by the path of its layers, or by its kind."""

    branch: Branch
    path: str
    types: tuple[str, ...]


class Surroundings:
    """What a pass asks of the graph around branches, in the state before its edits."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.branches = branches(program)
        self.writers = Writers(program)
        self.writes = Writes(program.graph, program.module)

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        return 1 + max((b.layer for b in self.branches), default=-1)

    def tensors(self, branch: Branch) -> Sequence[str] | str:
        """The parameters that what a branch adds is linear in; where it is not, or others use them too, the reason."""
        plan = self.writers.of(branch.stream, branch.writer)
        if isinstance(plan, str):
            return plan
        if len(self.writers.uses.calls(str(plan.node.target))) > 1:
            return f"{plan.node.target} is called more than once"
        if plan.shared:
            return f"{plan.shared[0]} is read elsewhere too"
        return [path for path, _ in plan.tensors]


@dataclass(frozen=True)
class Placing(Pass):
    """Put layers at residual branches: a base class.

    A method says why it leaves a branch as it is (``obstacle``) and what it does at one (``place``).
    """

    absence = "nothing is added to a residual stream"
    where: Selector = option(Selector("*"), "branches, by the path of their layers: glob, type: of their kind, re:, !")

    def run(self, program: Program, context: Context) -> None:
        around = Surroundings(program)
        spots = [Spot(b, b.path or str(b.output), (b.kind,)) for b in around.branches]
        ready = []
        for spot in context.choose(spots, self.where):
            reason = self.obstacle(spot.branch, around)
            if reason:
                context.skip(spot.path, reason)
            else:
                ready.append(spot.branch)
        self.place_all(ready, around, context)

    def obstacle(self, branch: Branch, around: Surroundings) -> str:
        """Why a branch is left alone; empty if nothing stands in the way."""
        return ""

    def place_all(self, ready: Sequence[Branch], around: Surroundings, context: Context) -> None:
        """Put the method's layers at the branches where nothing stands in the way."""
        for branch in ready:
            self.place(branch, around, context)

    def place(self, branch: Branch, around: Surroundings, context: Context) -> None:
        """Put the method's layers at a branch."""
        raise NotImplementedError


def into_sum(branch: Branch) -> Node:
    """The first node behind what a branch writes, on its way to the sum."""
    return branch.carriers[0] if branch.carriers else branch.addition


class times:  # noqa: N801
    """t ↦ factor · t, as a function that a parameter can follow by."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.factor
