"""Taking residual branches out: what the passes that drop attention, FFNs or whole blocks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.influence import BlockInfluence, depth
from rewrite.analysis.kinds import Kind
from rewrite.analysis.residuals import ADDS
from rewrite.errors import OptionError, RewriteError
from rewrite.graph.nodes import packet
from rewrite.proof.contract import CLOSE, NEW, Contract

from .numbers import numbers
from .pass_ import Pass, option

if TYPE_CHECKING:
    from rewrite.graph.program import Program

    from .context import Context


@dataclass(frozen=True)
class Dropping(Pass):
    """Drops the branches of some layers: x + F(x) becomes x. ``kinds`` are the kinds of branches that go."""

    kinds: ClassVar[tuple[Kind, ...]] = ()

    layers: str = option("", "numbers of the layers, as `rewrite show` counts them: '1,2', '0-3,8', or auto:N")
    bound: float = option(1.0, "largest error of a sum without its branch, relative, root mean square", above=0, finite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers and not self._wanted():
            try:
                numbers(self.layers)
            except RewriteError as error:
                raise OptionError(f"option 'layers' of pass '{self.name}': {error}", "layers") from None

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        every = branches(program)
        fitting = [b for b in every if b.kind in self.kinds]
        if not fitting:
            return
        chosen = self._by_data(program, fitting, context) if self._wanted() else self._listed(every, fitting)
        for branch in fitting:
            if branch.layer not in chosen:
                context.skip(branch.path, f"layer {branch.layer} is not among {', '.join(map(str, chosen))}")
            elif branch.leaks:
                readers = ", ".join(dict.fromkeys(str(n.target if n.op == "call_module" else n.name) for n in branch.leaks))
                context.skip(branch.path, f"other things read what it computes: {readers}")
            else:
                drop(branch, context)
        context.edit.sweep()

    def _listed(self, every: Sequence[Branch], fitting: Sequence[Branch]) -> tuple[int, ...]:
        has = ", ".join(str(n) for n in dict.fromkeys(b.layer for b in fitting))
        if not self.layers:
            raise RewriteError(f"{self.name} needs to be told which layers: layers='1,2'; there are {has}")
        chosen, last = numbers(self.layers), max(b.layer for b in every)
        if chosen[-1] > last:
            raise RewriteError(f"layers={self.layers}: the model has layers 0 to {last} (of this kind: {has})")
        return chosen

    def _wanted(self) -> int:
        """How many layers `auto:N` asks for, 0 where layers are listed."""
        word, _, count = self.layers.partition(":")
        return int(count) if word == "auto" and count.isdecimal() and len(count) < 6 else 0

    def weighs(self, block: BlockInfluence) -> float:
        """How much a layer counts when the least are chosen: the largest contribution of the branches that would go."""
        return max((b.contribution for b in block.branches if b.kind in self.kinds), default=float("inf"))

    def _by_data(self, program: Program, fitting: Sequence[Branch], context: Context) -> tuple[int, ...]:
        """The layers that add least on the data, the last layer of the model aside."""
        if context.data is None:
            raise RewriteError(f"layers={self.layers} chooses by data: give some with --data FILE, or list the layers")
        found = depth(program, context.data, dependency=False, seed=context.seed).blocks
        there = {b.layer for b in fitting} - {found[-1].layer}
        ranked = sorted((self.weighs(block), block.layer) for block in found if block.layer in there)
        if len(ranked) < self._wanted():
            raise RewriteError(f"layers={self.layers}: there are {len(ranked)} to choose from, the last one aside")
        return tuple(sorted(layer for _, layer in ranked[: self._wanted()]))


def drop(branch: Branch, context: Context) -> None:
    """Let what read the sum read what the branch was added to, and remove the branch."""
    edit, carriers, addition = context.edit, [*branch.carriers], branch.addition
    last = (branch.writer, *carriers)[-1]
    if addition not in last.users:  # it added up two branches, and the other one was dropped: the sum behind it is left
        addition = next(iter(last.users))
        while packet(addition) not in ADDS:
            carriers.append(addition)
            last, addition = addition, next(iter(addition.users))
    other = next(a for a in addition.args[:2] if isinstance(a, Node) and a is not last)  # as the edits before left it
    edit.rewire(addition, other)
    edit.write_apart(other)
    edit.remove_unused([addition, *carriers, *branch.nodes], branch.path, f"{branch.kind} dropped")
