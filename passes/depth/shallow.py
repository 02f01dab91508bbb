"""A stack of residual layers as one: every branch reads what the first one reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.writes import Writes
from rewrite.errors import OptionError, RewriteError
from rewrite.pipeline.beginning import begin, fits, own_reshapes
from rewrite.pipeline.numbers import numbers
from rewrite.pipeline.pass_ import Pass, option
from rewrite.proof.contract import CLOSE, NEW, Contract

from .parallel_block import ShareNorms

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class Shallow(Pass):
    """Take a stack of residual layers to first order: x + Σ f_i(x), where f_i read x and what all before it had added.

    f_1, f_2, ... are the branches of the layers, attention and FFN alike: f_i(x + δ) is taken for f_i(x), the first term of
    its Taylor series. What each reads instead is measured and held against `bound`; the model wants healing afterwards. All
    branches can then run at once. One norm serves those that are the same (`fold-affine` before it sees to that), and
    `merge-linears{within=model}` makes their projections one. Layers in a row are one stack: '2-4,7-8' are two.

    Left alone, with the reason: layers with norms after the additions, streams that are written in place.

    Source: Veit et al., "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NeurIPS 2016
    (arXiv 1605.06431), section 3, whose unraveled view this cuts after its first order.
    """

    name = "shallow"
    absence = "nothing is added to a residual stream"
    layers: str = option("", "numbers of the layers, as `rewrite show` counts them: '4-7', or several stacks: '2-3,6-8'")
    bound: float = option(1.0, "largest error of what a branch reads, relative, root mean square", above=0, finite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = numbers(self.layers) if self.layers else None
        except RewriteError as error:
            raise OptionError(f"option 'layers' of pass '{self.name}': {error}", "layers") from None

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        every = branches(program)
        if not every:
            return []
        last = max(b.layer for b in every)
        chosen = chosen_of(self.layers, self.name, last)
        writes = Writes(program.graph, program.module)
        for branch in every:
            reason = stays(branch, writes) if branch.layer in chosen else f"layer {branch.layer} is not among the chosen"
            if reason:
                context.skip(branch.path, reason)
        ready = {n for n in chosen if all(not stays(b, writes) for b in every if b.layer == n)}
        stacks = [stack for stack in runs(sorted(ready)) if sum(b.layer in stack for b in every) > 1]
        if not stacks:
            return []
        text = ",".join(f"{stack[0]}-{stack[-1]}" for stack in stacks)
        own = [[b for b in every if b.layer in stack] for stack in stacks]
        moved = [(b, first.starts[0]) for first, *others in own for b in others if _begins(b, first)]
        for branch in (b for b, value in moved if not fits(b.starts[0], value)):
            context.skip(branch.path, "its stream has another shape where it would begin")
        return [*own_reshapes(moved), _ToFirst(text, self.bound), ShareNorms(text)]


def chosen_of(text: str, name: str, last: int) -> tuple[int, ...]:
    """The layers that a text lists. Raises RewriteError where it lists none, or more than there are."""
    if not text:
        raise RewriteError(f"{name} needs to be told which layers: '1-2'; there are 0 to {last}")
    chosen = numbers(text)
    if chosen[-1] > last:
        raise RewriteError(f"{text} is asked of {name}: the model has layers 0 to {last}")
    return chosen


def runs(chosen: Sequence[int]) -> Iterator[list[int]]:
    """Numbers in a row, together."""
    run: list[int] = []
    for number in chosen:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def stays(branch: Branch, writes: Writes) -> str:
    """Why a branch cannot read another value of its stream; empty if nothing stands in the way."""
    if branch.order == "post":
        return "its norm stands after the addition"
    if len(branch.starts) != 1:
        return "it reads the stream at more than one place"
    return "the stream is written in place" if writes.into(branch.starts[0]) or writes.into(branch.addition) else ""


def _begins(branch: Branch, first: Branch) -> bool:
    """Whether a branch of a stack is to begin where the first one does, and does not yet."""
    return branch.stream is first.stream and branch.starts != first.starts


@dataclass(frozen=True)
class _ToFirst(Pass):
    """Let all branches of a stack read what its first one reads."""

    name = "branches-side-by-side"
    stacks: str = option("", "numbers of the layers of each stack: '2-3,6-8'")
    bound: float = option(1.0, "largest error of what a branch reads, relative, root mean square")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        every = branches(program)
        for stack in runs(numbers(self.stacks)):
            first, *others = [b for b in every if b.layer in stack]
            for branch in others:
                if _begins(branch, first):
                    begin(context.edit, branch, first.starts[0])
