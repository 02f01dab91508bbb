"""What the passes share that put norms by running statistics in place of norms: where, and what the statistics start at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.norms import Norm, norms
from rewrite.analysis.observe import observe

from .replacing import Replacing

if TYPE_CHECKING:
    from rewrite.graph.program import Program

    from .context import Context


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of each channel of what a norm is given, float64 [C]; 0 and 1 where there is no data."""

    mean: torch.Tensor
    variance: torch.Tensor

    @property
    def square(self) -> torch.Tensor:
        """The mean square."""
        return self.variance + self.mean.square()


@dataclass(frozen=True)
class RunningNorms(Replacing):
    """Put norms by running statistics in place of norms: a base class.

    With data the statistics start at those of what each norm is given on it. A method says the layer (``layer_with``).
    """

    absence = "no layer of it is a LayerNorm or RMSNorm"

    def places(self, program: Program) -> Sequence[Norm]:
        return norms(program)

    def obstacle(self, place: Norm, program: Program) -> str:
        fits = place.channel_axis == -1 and len(place.shape) == 1
        return "" if fits else "its channels are not the last axis alone"

    def layer_with(self, place: Norm, start: Statistics) -> nn.Module:
        """The layer in place of a norm."""
        raise NotImplementedError

    def run(self, program: Program, context: Context) -> None:
        firsts = {place.path: place for place in reversed(self.places(program))}
        ready = []
        for place in context.choose(reversed(firsts.values()), self.where):
            if reason := self.obstacle(place, program):
                context.skip(place.path, reason)
            else:
                ready.append(place)
        starts = _measured(ready, program, context)
        for place, start in zip(ready, starts, strict=True):
            context.edit.replace_layer(place.path, self.layer_with(place, start))


def _measured(places: Sequence[Norm], program: Program, context: Context) -> list[Statistics]:
    if context.data is None or not places:
        ones = [torch.ones(place.shape, dtype=torch.float64) for place in places]
        return [Statistics(torch.zeros_like(one), one) for one in ones]
    sources: list[Node] = [place.node.all_input_nodes[0] for place in places]
    found = observe(program, sources, context.data, progress=context.progress, seed=context.seed, axis=-1)
    return [Statistics(found[source].mean, found[source].variance) for source in sources]


def buffer(value: torch.Tensor, norm: Norm) -> torch.Tensor:
    """A statistic in the dtype and on the device of a norm's parameters."""
    dtype = norm.value.dtype if norm.weight is None else norm.weight.dtype
    return value.to(norm.device, dtype)


def weight_of(norm: Norm) -> nn.Parameter:
    """The norm's weight, or ones where it has none."""
    if norm.weight is not None:
        return norm.weight
    return nn.Parameter(torch.ones(norm.shape, dtype=norm.value.dtype, device=norm.device))
