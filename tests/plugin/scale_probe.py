"""A third party's pass, in one module of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rewrite import Contract, Pass, Selector
from rewrite.pipeline.pass_ import option
from rewrite.proof.contract import SAME

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class ScaleProbe(Pass):
    """Look at the scales of layers and change nothing."""

    name = "scale_probe"
    where: Selector = option(Selector("*"), "layers to look at")
    norm: Literal["max", "mean"] = option("max", "how a scale is taken")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        """Leave the program as it is."""
