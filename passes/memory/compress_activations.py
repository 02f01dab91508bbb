"""Keep what autograd saves for the backward compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rewrite.errors import OptionError
from rewrite.pipeline.pass_ import Pass, option
from rewrite.proof.contract import ESTIMATE, SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

_BOUNDS = {8: (0.2, 0.98), 4: (1.0, 0.7), 2: (4.0, 0.3)}
"""Relative error and cosine that a gradient keeps to; where it is coarser, the model is not trained with so few bits."""


@dataclass(frozen=True)
class CompressActivations(Pass):
    """Keep saved tensors as whole numbers of 8, 4 or 2 bits in groups: min + scale · q, q = ⌊(x - min) / scale + u⌋.

    The forward is the same bit for bit; each storage is compressed once, masks to one bit. Parameters, buffers, inputs,
    integers and tensors of fewer than ``min_size`` numbers are kept as they are. With stochastic rounding the mean of the
    restored tensors is exact, new numbers are drawn at each step, and a seed gives the same ones. It is a property of the
    program: the grafted model has it too, a lowering for inference has not.

    Source: Liu et al., "GACT: Activation Compressed Training for Generic Network Architectures", ICML 2022
    (arXiv 2206.11357), section 4.
    """

    name = "compress-activations"
    bits: int = option(8, "bits of a number: 8, 4 or 2", at_least=2, at_most=8)
    group: int = option(256, "numbers that share a minimum and a scale, a multiple of 8", at_least=8, at_most=2**20)
    rounding: Literal["stochastic", "nearest"] = option("stochastic", "stochastic or nearest")
    min_size: int = option(4096, "fewest numbers of a tensor that is compressed", at_least=1, at_most=2**30)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in _BOUNDS:
            raise OptionError(f"option 'bits' of pass '{self.name}' is 8, 4 or 2, not {self.bits}", "bits")
        if self.group % 8:
            raise OptionError(f"option 'group' of pass '{self.name}' is a multiple of 8, not {self.group}", "group")

    def contract(self) -> Contract:
        bound, cosine = _BOUNDS[self.bits]
        return Contract(forward=SAME, backward=ESTIMATE, bound=bound, cosine=cosine)

    def run(self, program: Program, context: Context) -> None:
        if any(parameter.requires_grad for parameter in program.module.parameters()):
            context.edit.set_property(
                "saved_tensors",
                {"bits": self.bits, "group": self.group, "rounding": self.rounding, "min_size": self.min_size},
            )
