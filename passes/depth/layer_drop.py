"""Whole layers that are left out at random in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.skipping import Skipping
from rewrite.torch_private import _DropoutNd

if TYPE_CHECKING:
    from rewrite.analysis.blocks import Block
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class LayerDrop(_DropoutNd):
    """In training, with probability p for the whole call, ``start``, what flowed into a block, instead of ``end``."""

    def forward(self, end: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return torch.nn.functional.dropout(end, self.p, False)
        return torch.where(torch.rand((), device=end.device) < self.p, start, end)


@dataclass(frozen=True)
class LayerDropPass(Skipping):
    """Leave whole layers out at random in training: y = x with probability rate, else the layer's output, one draw a call.

    Nothing is scaled, as in the paper: a model trained so stands dropping layers afterwards (``drop-blocks``). Evaluation
    stays the same. A layer that is left out is computed all the same: the graph is one for all draws, time is not saved. So
    is its gradient, which is zeros, not None: an optimizer's momentum and decay move its weights in that step, too.

    Left alone, with the reason: blocks with norms after the additions, blocks that change the shape.

    Source: Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020 (arXiv 1909.11556),
    section 3.
    """

    name = "layer-drop"
    inserts = (LayerDrop,)
    rate: float = option(0.1, "how often a layer is left out", at_least=0, below=1)

    def obstacle(self, block: Block, program: Program) -> str:
        layers = (program.layer(user) for user in block.end.users if user.op == "call_module")
        return "it is left out at random already" if any(isinstance(layer, LayerDrop) for layer in layers) else ""

    def place(self, block: Block, program: Program, context: Context) -> None:
        insert_behind(context.edit, block.end, "drop", LayerDrop(self.rate), also=[block.start])
