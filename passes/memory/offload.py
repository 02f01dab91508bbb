"""Keep what autograd saves in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewrite.pipeline.pass_ import Pass, option
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class Offload(Pass):
    """Keep saved tensors in the host's memory until the backward: a copy there, and one back.

    The forward and the gradient are the same bit for bit. Each storage is moved once; parameters, buffers, inputs and
    tensors of fewer than ``min_size`` numbers stay on the device, as does all that the host holds already: a model on the
    CPU keeps what it kept. It is a property of the program: the grafted model has it too, a lowering for inference has not.

    Source: Rhu et al., "vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural Network Design", MICRO
    2016 (arXiv 1602.08124).
    """

    name = "offload"
    min_size: int = option(4096, "fewest numbers of a tensor that is moved", at_least=1, at_most=2**30)

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        parameters = [p for p in program.module.parameters() if p.requires_grad]
        if not parameters:
            return
        context.edit.set_property("offload", {"min_size": self.min_size})
        if all(p.device.type == "cpu" for p in parameters):
            context.warn("the model is on the CPU, where nothing moves: it saves memory once it is on a device")
