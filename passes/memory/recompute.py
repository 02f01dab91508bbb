"""Compute in the backward again what a region keeps, or what a norm or an activation gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract
from rewrite.training.places import Place, adding, places

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class Recompute(Pass):
    """Compute in the backward again: regions keep their inputs alone, norms and activations their input for their result.

    A region is a module of the model, by its path: all that it keeps is computed again from what it was given, with the same
    random numbers, and buffers are written once. Of a norm or an activation the input is kept, as it is anyway, and the
    result, which the next layer keeps, is computed again from it. Without ``where`` it is every block (a module whose name
    is a number), and the norms and activations outside of them; a place inside another that is chosen goes with it. It is a
    property of the program: the forward and the gradient are the same bit for bit, the grafted model has it too, a lowering
    for inference has not.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); of norms and activations,
    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198).
    """

    name = "recompute"
    where: Selector = option(Selector("*"), "modules, norms and activations: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        if not any(parameter.requires_grad for parameter in program.module.parameters()):
            return
        named = str(self.where) != type(self)().where.text
        found = [place for place in places(program) if named or place.is_standard]
        chosen = context.choose(sorted(found, key=lambda place: bool(place.obstacle)), self.where)
        done = {path for paths in program.properties.get("recompute", {}).values() for path in paths}
        taken: list[Place] = []
        covered: list[str] = []
        for place in sorted(chosen, key=lambda place: (place.path.count("."), place.is_layer)):
            is_within = any(place.path.startswith(f"{path}.") for path in covered)
            if place.obstacle or is_within:
                context.skip(place.path, place.obstacle or "it is computed again with the region around it")
            else:
                covered.append(place.path)
                taken += [place] * (place.path not in done)
        if taken:
            context.edit.set_property("recompute", adding(program.properties.get("recompute"), taken))
        lone = [place.path for place in taken if not place.is_own]
        if lone:
            words = ", ".join(lone[:3]) + ", ..." * (len(lone) > 3)
            context.warn(f"your class calls a function at {words}: a grafted model keeps what it kept there")
