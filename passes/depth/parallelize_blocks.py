"""Whole blocks side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch.fx import Node

from rewrite.analysis.blocks import Block, blocks_of
from rewrite.analysis.branches import branches
from rewrite.analysis.writes import Writes
from rewrite.errors import OptionError, RewriteError
from rewrite.graph.fakes import same_shape
from rewrite.graph.nodes import aten, packet
from rewrite.pipeline.numbers import numbers
from rewrite.pipeline.pass_ import Pass, option
from rewrite.proof.contract import CLOSE, NEW, SAME, Contract

from .shallow import chosen_of, runs, stays

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class ParallelizeBlocks(Pass):
    """Let blocks in a row read the same value: x + B_1(x) + B_2(x), where B_2 read x + B_1(x); B(x) is what a block adds.

    Within a block its branches stay in their order: B(x) = A(x) + F(x + A(x)). In steps, each proven: every later block of
    a pair gets sums of its own (the same), then they begin at what the first block reads: an approximation, whose error at
    what each norm and sum reads is measured and held against `bound`; the model wants healing afterwards. '1-2,5-6' are two
    pairs, '1-3' is three blocks at once.

    Left alone, with the reason: blocks with norms after the additions, sums that are written in place, and blocks between
    which something else reads the stream.

    Source: Verma et al., "Leveraging the true depth of LLMs" (arXiv 2502.02790), section 3, with whole blocks in parallel.
    """

    name = "parallelize-blocks"
    absence = "nothing is added to a residual stream"
    pairs: str = option("", "numbers of the layers of each pair, as `rewrite show` counts them: '1-2,5-6'")
    bound: float = option(1.0, "largest error of what a block reads, relative, root mean square", above=0, finite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = list(_pairs(self.pairs)) if self.pairs else None
        except RewriteError as error:
            raise OptionError(f"option 'pairs' of pass '{self.name}': {error}", "pairs") from None

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        every = {block.layer: block for block in blocks_of(branches(program))}
        if not every:
            return []
        chosen_of(self.pairs, self.name, max(every))
        writes, found = Writes(program.graph, program.module), list[_Place]()
        for pair in _pairs(self.pairs):
            blocks = [every[n] for n in pair if n in every]
            reason = next(filter(None, (_obstacle(block, i, writes) for i, block in enumerate(blocks))), "")
            if not reason and not all(same_shape(block.start, blocks[0].start) for block in blocks):
                reason = "the stream has another shape at a later block"
            if reason or len(blocks) < 2:
                context.skip(blocks[0].path if blocks else self.pairs, reason or "there is no other block beside it")
            else:
                found += [_Place(blocks[0].start.name, block) for block in blocks[1:]]
        for block in every.values():
            if all(block.layer not in pair for pair in _pairs(self.pairs)):
                context.skip(block.path, f"layer {block.layer} is not among pairs={self.pairs}")
        if not found:
            return []
        later = ",".join(str(place.block.layer) for place in found)
        text = ";".join(f"{place.first},{place.block.start.name},{place.block.branches[0].addition.name}" for place in found)
        return [_OwnSums(later), _Begin(text, self.bound)]


class _Place(NamedTuple):
    """A block that is to begin at the value of this name."""

    first: str
    block: Block


def _pairs(text: str) -> Iterator[list[int]]:
    """Each pair that a text lists, apart from the next one: '1-2,3-4' are two."""
    for part in text.split(","):
        yield from runs(numbers(part))


def _obstacle(block: Block, place: int, writes: Writes) -> str:
    """Why a block must stay where it is; the first of a pair (``place`` 0) does."""
    reason = next(filter(None, (stays(branch, writes) for branch in block.branches)), "")
    if reason:
        return reason
    if any(packet(b.addition) is not aten.add or len(b.addition.args) != 2 or b.addition.kwargs for b in block.branches):
        return "what it adds is scaled in the sum, or added in place"
    own = {n for branch in block.branches for n in branch.nodes} | {block.branches[0].addition}
    other = next((user for user in block.start.users if user not in own), None)
    return f"{other.name} reads what flows between it and the block before" if place and other is not None else ""


@dataclass(frozen=True)
class _OwnSums(Pass):
    """Let the branches of some blocks read sums of their own, beside those of the stream."""

    name = "blocks-with-sums-of-their-own"
    layers: str = option("", "numbers of the layers")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        chosen, edit = numbers(self.layers), context.edit
        for block in [block for block in blocks_of(branches(program)) if block.layer in chosen]:
            own: Node = block.start
            for place, branch in enumerate(block.branches[:-1]):
                later = {n for after in block.branches[place + 1 :] for n in after.nodes}
                args = tuple(own if a is branch.other else a for a in branch.addition.args)
                own = edit.insert_function(aten.add.Tensor, args, after=branch.addition)
                edit.move([branch.addition], "it is computed twice")  # so that the proof holds both sums in one part
                edit.rewire(branch.addition, own, users=later.__contains__)


@dataclass(frozen=True)
class _Begin(Pass):
    """Let blocks begin at another value of their stream."""

    name = "blocks-side-by-side"
    places: str = option("", "for each block the names of: the value that it is to begin at, the one it begins at, its sum")
    bound: float = option(1.0, "largest error of what a block reads, relative, root mean square")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        nodes = {node.name: node for node in program.graph.nodes}
        for first, start, total in [text.split(",") for text in self.places.split(";")]:
            context.edit.rewire(nodes[start], nodes[first], users=(set(nodes[start].users) - {nodes[total]}).__contains__)
