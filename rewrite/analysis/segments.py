"""Cutting runs of layers into segments, each of which becomes one layer: at the least error within a budget of time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LEVELS = 400
"""In how many steps the budget is counted."""
Segment = tuple[int, int]
"""The first and the last layer of a segment, by number."""


def best_segments(
    count: int, seconds: Mapping[Segment, float], errors: Mapping[Segment, float], budget: float
) -> tuple[Segment, ...] | None:
    """The segments of ``count`` layers in a row with Σ seconds <= budget and the least Σ errors; None where none fits.

    ``seconds`` and ``errors`` hold the segments that are allowed. D[k, t] is the least error of the first k layers within t
    of LEVELS steps of the budget: D[k, t] = min over segments (i, k - 1) of D[i, t - seconds] + error. A segment's time is
    rounded to whole steps.

    Source: Kim et al., "LayerMerge", ICML 2024 (arXiv 2406.12837), section 4, whose table this is for one kind of choice.
    """
    step = budget / LEVELS
    steps = {segment: round(time / step) for segment, time in seconds.items()}
    best: list[list[tuple[float, Segment | None]]] = [[(0.0, None)] * (LEVELS + 1)]
    for end in range(1, count + 1):
        row: list[tuple[float, Segment | None]] = []
        for level in range(LEVELS + 1):
            ways = [
                (best[i][level - steps[i, end - 1]][0] + errors[i, end - 1], (i, end - 1))
                for i in range(end)
                if (i, end - 1) in steps and steps[i, end - 1] <= level
            ]
            row.append(min(ways, default=(math.inf, None)))
        best.append(row)
    return None if math.isinf(best[count][LEVELS][0]) else tuple(_traced(best, steps, count))


def _traced(
    best: Sequence[Sequence[tuple[float, Segment | None]]], steps: Mapping[Segment, int], count: int
) -> Sequence[Segment]:
    found, level = [], LEVELS
    while count:
        segment = best[count][level][1]
        assert segment is not None
        found.append(segment)
        count, level = segment[0], level - steps[segment]
    return found[::-1]
