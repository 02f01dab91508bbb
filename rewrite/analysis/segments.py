"""Cutting runs of layers into segments, each of which becomes one layer: at the least error within a budget of time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewrite.graph.program import Program

LONGEST = 4
"""How many layers become one at most: kernels grow with each."""
LEVELS = 400
"""In how many steps the budget is counted."""
ROUNDING = 1e-9
"""By how much a sum of times that are the budget together may be off, relative."""
Segment = tuple[int, ...]
"""The first and the last layer of a segment, by number, and behind them those in it that are left out."""


class Way(NamedTuple):
    """A way to cut the first layers: what it costs, its last segment, and where the way to cut those before it is kept."""

    error: float = 0.0
    seconds: float = 0.0
    segment: Segment = ()
    before: int = 0


def best_segments(
    count: int, seconds: Mapping[Segment, float], errors: Mapping[Segment, float], budget: float
) -> tuple[Segment, ...] | None:
    """The segments of ``count`` layers in a row with Σ seconds <= budget and the least Σ errors; None where none fits.

    ``seconds`` and ``errors`` hold the segments that are allowed, each in as many ways as it can be made. D[k, t] is the
    least error of the first k layers in t of LEVELS steps of the budget: D[k, t] = min over segments (i, k - 1, ...) of
    D[i, t - seconds] + error. Times are rounded to steps to tell ways apart; what fits is told by the times as they are.

    Source: Kim et al., "LayerMerge", ICML 2024 (arXiv 2406.12837), section 4.
    """
    best: list[dict[int, Way]] = [{0: Way()}]
    for end in range(count):
        row = dict[int, Way]()
        for segment in (s for s in seconds if s[1] == end):
            for level, way in best[segment[0]].items():
                found = Way(way.error + errors[segment], way.seconds + seconds[segment], segment, level)
                step = round(found.seconds / budget * LEVELS)
                if found.seconds <= budget * (1 + ROUNDING):
                    row[step] = min(row.get(step, found), found)
        best.append(row)
    return tuple(_traced(best)) if best[count] else None


def _traced(best: Sequence[Mapping[int, Way]]) -> Sequence[Segment]:
    way, found = min(best[-1].values()), list[Segment]()
    while way.segment:
        found.append(way.segment)
        way = best[way.segment[0]][way.before]
    return found[::-1]


class SegmentValues:
    """What flows into and out of each of some layers in one call of a program, and how far segments of them move that.

    ``row`` has the path of each layer, and whether an activation stands before it, behind the layer before.
    """

    @torch.no_grad()
    def __init__(
        self, program: Program, row: Sequence[tuple[str, bool]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        module = program.clone().module.eval()
        self.layers: list[nn.Module] = [module.get_submodule(path) for path, _ in row]
        self.activated = [activated for _, activated in row]
        self.given, self.value = dict[int, Tensor](), dict[int, Tensor]()
        self.merged = functools.lru_cache(maxsize=2**LONGEST)(self._merged)
        hooks = [layer.register_forward_hook(self._noting(i)) for i, layer in enumerate(self.layers)]
        module(*args, **kwargs)
        for hook in hooks:
            hook.remove()

    def error(self, segment: Segment) -> float:
        """‖y' - y‖ / ‖y‖ of a segment's output without its activations and what is left out."""
        first, last, *gone = segment
        kept = tuple(i for i in range(first, last + 1) if i not in gone)
        return _apart(self.merged(first, kept) if kept else self._begun(segment), self.value[last])

    def largest(self, segment: Segment) -> float:
        """The largest ‖x' - x‖ / ‖x‖ of what reads something that is left out, with all before that as it was."""
        first, last, *gone = segment
        held, found = self._begun(segment), [0.0]
        for i in (i for i in range(first, last + 1) if i not in gone):
            found.append(_apart(held, self.given[i]))
            held = self.value[i]
        return max(*found, _apart(held, self.value[last]))

    def _noting(self, number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
            self.given[number], self.value[number] = args[0].detach().clone(), value.detach().clone()

        return note

    def _begun(self, segment: Segment) -> Tensor:
        """What a segment reads; before its activation, where that goes as well, since nothing of the segment stays."""
        first, last, *gone = segment
        return self.value[first - 1] if self.activated[first] and len(gone) > last - first else self.given[first]

    @torch.no_grad()
    def _merged(self, first: int, kept: tuple[int, ...]) -> Tensor:
        x = self.merged(first, kept[:-1]) if len(kept) > 1 else self.given[first]
        value: Tensor = self.layers[kept[-1]](x)
        return value


def _apart(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm().clamp_min(1e-30))
