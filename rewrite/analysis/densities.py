"""How a sparsity is spread over the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Ratios = Literal["uniform", "er", "erk"]


def densities(shapes: Sequence[tuple[int, ...]], density: float, ratios: Ratios) -> list[float]:
    """The density of each weight, so that over all of them the share ``density`` is kept.

    With sizes s of a weight and n = Π s, raw = Σ s / n (``er``: of the first two sizes); its density is eps · raw, with
    eps such that the counts add up; the weights for which that exceeds 1 are dense, the largest first.
    """
    if ratios == "uniform" or not shapes:
        return [density] * len(shapes)
    counts = [math.prod(shape) for shape in shapes]
    sizes = [shape if ratios == "erk" else shape[:2] for shape in shapes]
    raw = [sum(size) / math.prod(size) for size in sizes]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        kept = density * sum(counts) - sum(counts[i] for i in dense)
        eps = kept / sum(raw[i] * counts[i] for i in rest) if rest else 0.0
        largest = max((raw[i] for i in rest), default=0.0)
        if eps * largest <= 1:
            return [1.0 if i in dense else max(0.0, eps * raw[i]) for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == largest}
