"""The output of each norm scaled by the depth it stands in (LayerNorm Scaling)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from rewrite.analysis.branches import branches
from rewrite.analysis.norms import Norm, norm_of
from rewrite.graph.layers import Scale
from rewrite.pipeline.folding import NormReaders, fold_gain
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class DepthScale(Scale):
    """y = x / √layer, for a layer that counts from 1."""

    def __init__(self, layer: int) -> None:
        super().__init__(1 / math.sqrt(layer))
        self.layer = layer


class Placed(NamedTuple):
    """A norm with the number of its layer, from 1."""

    norm: Norm
    layer: int
    path: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class NormScaling(Pass):
    """Scale what the norm before each branch gives by 1 over the root of its layer's number: N(x) / √l, l from 1.

    In pre-norm models the variance of the stream grows from layer to layer, and deep layers come near to the identity; the
    scale keeps it down. ``mode=exact`` keeps the function of a trained model: the linear layers that read the norm are
    multiplied by √l. ``mode=new`` leaves them: another function, to be trained from the start.

    Layer 1 stays: its factor is 1. Left alone, with the reason: norms scaled already and, with ``mode=exact``, norms that
    something else reads than linear layers of their own.

    Source: Sun et al., "The Curse of Depth in Large Language Models" (arXiv 2502.05795), equation 7.
    """

    name = "norm-scaling"
    inserts = (DepthScale,)
    absence = "no norm stands before a branch behind the first layer"
    mode: Literal["exact", "new"] = option("exact", "exact: the layers that read the norm take √l; new: the plain scale")
    where: Selector = option(Selector("*"), "norms to scale: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        promise = SAME if self.mode == "exact" else NEW
        return Contract(forward=promise, backward=promise)

    def run(self, program: Program, context: Context) -> None:
        found = NormReaders(program)
        for placed in context.choose(list(_placed(program)), self.where):
            reason = self._obstacle(placed, found)
            if reason:
                context.skip(placed.path, reason)
                continue
            node = placed.norm.node
            if self.mode == "exact":
                context.edit.move([node], "the scale behind it is given back")
                fold_gain(context.edit, found.linears(node), _Root(placed.layer))
            insert_behind(context.edit, node, "scale", DepthScale(placed.layer))

    def _obstacle(self, placed: Placed, found: NormReaders) -> str:
        if any(isinstance(found.uses.layer(user), DepthScale) for user in placed.norm.node.users):
            return "it is scaled already"
        return found.obstacle(placed.norm.node, shifted=False) if self.mode == "exact" else ""

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """x times l to the power of -1/2."""
        assert isinstance(new, DepthScale)
        return inputs[0] / math.sqrt(new.layer)


@dataclass(frozen=True)
class _Root:
    """√layer, as a gain."""

    layer: int

    def __call__(self) -> torch.Tensor:
        return torch.tensor(self.layer, dtype=torch.float64).sqrt()


def _placed(program: Program) -> Iterator[Placed]:
    """The norms at the start of branches, each once, from layer 2 on."""
    seen = set()
    for branch in branches(program):
        for node in branch.norms if branch.order in ("pre", "peri") and branch.layer else ():
            norm = norm_of(program, node)
            if norm is not None and node not in seen:
                seen.add(node)
                yield Placed(norm, branch.layer + 1, norm.path, norm.types)
