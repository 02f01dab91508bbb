"""Taking residual branches out: what the passes that drop attention, FFNs or whole blocks share."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.errors import OptionError, RewriteError
from rewrite.proof.contract import CLOSE, NEW, Contract

from .numbers import numbers
from .pass_ import Pass, option

if TYPE_CHECKING:
    from rewrite.graph.program import Program

    from .context import Context


@dataclass(frozen=True)
class Dropping(Pass):
    """Drops the branches of some layers: x + F(x) becomes x."""

    layers: str = option("", "numbers of the layers, as `rewrite show` counts them: '1,2' or '0-3,8'")
    bound: float = option(1.0, "largest error of a sum without its branch, relative, root mean square", above=0, finite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers:
            try:
                numbers(self.layers)
            except RewriteError as error:
                raise OptionError(f"option 'layers' of pass '{self.name}': {error}", "layers") from None

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    @abc.abstractmethod
    def drops(self, branch: Branch) -> bool:
        """Whether the pass is about branches of this kind."""

    def run(self, program: Program, context: Context) -> None:
        every = branches(program)
        fitting = [b for b in every if self.drops(b)]
        if not fitting:
            return
        chosen = self._chosen(every, fitting)
        for branch in fitting:
            if branch.layer not in chosen:
                context.skip(branch.path, f"layer {branch.layer} is not among layers={self.layers}")
            elif branch.leaks:
                readers = ", ".join(dict.fromkeys(str(n.target if n.op == "call_module" else n.name) for n in branch.leaks))
                context.skip(branch.path, f"other things read what it computes: {readers}")
            else:
                drop(branch, context)
        context.edit.sweep()

    def _chosen(self, every: Sequence[Branch], fitting: Sequence[Branch]) -> tuple[int, ...]:
        has = ", ".join(str(n) for n in dict.fromkeys(b.layer for b in fitting))
        if not self.layers:
            raise RewriteError(f"{self.name} needs to be told which layers: layers='1,2'; there are {has}")
        chosen, last = numbers(self.layers), max(b.layer for b in every)
        if chosen[-1] > last:
            raise RewriteError(f"layers={self.layers}: the model has layers 0 to {last} (of this kind: {has})")
        return chosen


def drop(branch: Branch, context: Context) -> None:
    """Let what read the sum read what the branch was added to, and remove the branch."""
    edit, last = context.edit, (branch.writer, *branch.carriers)[-1]
    other = next(a for a in branch.addition.args[:2] if isinstance(a, Node) and a is not last)  # as the edits before left it
    edit.rewire(branch.addition, other)
    edit.remove_unused([branch.addition, *branch.carriers, *branch.nodes], branch.path, f"{branch.kind} dropped")
