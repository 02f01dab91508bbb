"""What the passes declare that put a layer of their own in place of single layers; it costs nothing to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewrite.proof.contract import NEW, Contract

from .pass_ import Pass, option
from .select import Selector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from rewrite.graph.program import Program

    from .context import Context


@dataclass(frozen=True)
class Replacing(Pass):
    """Replace layers one for one by layers from a formula: a base class.

    A method says its ``places`` (norms, sites), the layer for each (``layer_for``), and its formula (``reference``).
    """

    where: Selector = option(Selector("*"), "layers to replace: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def places(self, program: Program) -> Sequence[Any]:
        """The calls of layers that can be replaced, each with ``path`` and ``types``."""
        raise NotImplementedError

    def obstacle(self, place: Any, program: Program) -> str:
        """Why a layer stays as it is; empty if nothing stands in the way."""
        return ""

    def layer_for(self, place: Any) -> nn.Module:
        """The layer in place of that at ``place``."""
        raise NotImplementedError

    def run(self, program: Program, context: Context) -> None:
        firsts = {place.path: place for place in reversed(self.places(program))}
        for place in context.choose(reversed(firsts.values()), self.where):
            if reason := self.obstacle(place, program):
                context.skip(place.path, reason)
            else:
                self.replace(place, self.layer_for(place), context)

    def replace(self, place: Any, layer: nn.Module, context: Context) -> None:
        """Put a layer in its place; a method may do more there."""
        context.edit.replace_layer(place.path, layer)
