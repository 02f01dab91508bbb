"""How many bits each saved tensor gets: the least Σ C_l / (2^b_l - 1)² with Σ b_l n_l at most an average times Σ n_l.

Source: Liu et al., "GACT: Activation Compressed Training for Generic Network Architectures", ICML 2022 (arXiv 2206.11357).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from .packer import BITS


def variance(cost: float, bits: int) -> float:
    """What a tensor adds to the gradient's variance: C / (2^b - 1)²."""
    return cost / float(2**bits - 1) ** 2


def allotted(costs: Sequence[float], sizes: Sequence[int], average: float) -> list[int]:
    """Bits for tensors of ``sizes`` numbers: from 8 downwards, first where a bit less adds least to the variance."""
    steps = dict(itertools.pairwise(BITS))
    bits = [BITS[0]] * len(costs)
    spare = sum(sizes) * average - sum(b * n for b, n in zip(bits, sizes, strict=True))

    def step(place: int) -> tuple[float, int]:
        fewer = steps[bits[place]]
        rise = variance(costs[place], fewer) - variance(costs[place], bits[place])
        return rise / ((bits[place] - fewer) * max(sizes[place], 1)), place

    heap = [step(place) for place in range(len(costs))]
    heapq.heapify(heap)
    while spare < 0 and heap:
        _, place = heapq.heappop(heap)
        fewer = steps[bits[place]]
        spare += (bits[place] - fewer) * sizes[place]
        bits[place] = fewer
        if fewer in steps:
            heapq.heappush(heap, step(place))
    return bits
