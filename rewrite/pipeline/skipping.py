"""Whole blocks that are skipped in training: what the passes share that put such a switch behind blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rewrite.analysis.blocks import Block, blocks_of
from rewrite.analysis.branches import branches
from rewrite.errors import OptionError, RewriteError
from rewrite.graph.nodes import tensor_value
from rewrite.proof.contract import SAME, Contract

from .beginning import shaped
from .numbers import numbers
from .pass_ import Pass, option

if TYPE_CHECKING:
    from rewrite.graph.program import Program

    from .context import Context

ALL = "all"
MIDDLE = "middle"


@dataclass(frozen=True)
class Skipping(Pass):
    """Put a switch behind blocks that is off in evaluation: a base class.

    A method says why it leaves a block as it is (``obstacle``) and what it does at one (``place``).
    """

    absence = "nothing is added to a residual stream"
    layers: str = option(
        ALL, "numbers of the layers, as `rewrite show` counts them: '1,2' or '0-3,8'; all; middle: inner ones"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = None if self.layers in (ALL, MIDDLE) else numbers(self.layers)
        except RewriteError as error:
            raise OptionError(f"option 'layers' of pass '{self.name}': {error}", "layers") from None

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME, evaluation_only=True)

    def run(self, program: Program, context: Context) -> None:
        every = [replace(block, end=shaped(block.end, block.start)) for block in blocks_of(branches(program))]
        last = max((block.layer for block in every), default=-1)
        if self.layers not in (ALL, MIDDLE) and every and numbers(self.layers)[-1] > last:
            raise RewriteError(f"layers={self.layers}: the model has layers 0 to {last}")
        ready = []
        for block in every:
            reason = self._unchosen(block, last) or _unfit(block) or self.obstacle(block, program)
            if reason:
                context.skip(block.path, reason)
            else:
                ready.append(block)
        for block in reversed(ready):  # what one block gives is the next one's start, which has to be what the switch gives
            self.place(block, program, context)
        context.edit.sweep()

    def obstacle(self, block: Block, program: Program) -> str:
        """Why a block is left alone; empty if nothing stands in the way."""
        return ""

    def place(self, block: Block, program: Program, context: Context) -> None:
        """Put the method's layers at a block."""
        raise NotImplementedError

    def _unchosen(self, block: Block, last: int) -> str:
        if self.layers == MIDDLE:
            return "it is the first or the last layer" if block.layer in (0, last) else ""
        chosen = self.layers == ALL or block.layer in numbers(self.layers)
        return "" if chosen else f"layer {block.layer} is not among layers={self.layers}"


def _unfit(block: Block) -> str:
    if any(branch.order == "post" for branch in block.branches):
        return "its norm stands after the addition"
    start, end = tensor_value(block.start), tensor_value(block.end)
    same = start is not None and end is not None and str(start.shape) == str(end.shape)
    return "" if same else "what flows in and what flows out differ in shape"
