"""How many bits each saved tensor gets: the least Σ C_l / (2^b_l - 1)² with Σ b_l n_l at most an average times Σ n_l.

By integer programming: from 8 bits downwards step by step, as published, what is left at the end may be too little for the
one tensor that needs it.

Source: Liu et al., "GACT: Activation Compressed Training for Generic Network Architectures", ICML 2022 (arXiv 2206.11357).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from .packer import BITS

_SECONDS = 20.0


def variance(cost: float, bits: int) -> float:
    """What a tensor adds to the gradient's variance: C / (2^b - 1)²."""
    return cost / float(2**bits - 1) ** 2


def allotted(costs: Sequence[float], sizes: Sequence[int], average: float) -> list[int]:
    """Bits for tensors of ``sizes`` numbers, ``average`` of them at most in the mean; no fewer than fit."""
    if not costs:
        return []
    count, choices = len(costs), len(BITS)
    least = 1e-5 * max(costs) or 1.0  # what costs nothing takes what is left over
    rise = np.array([variance(max(cost, least), bits) for cost in costs for bits in BITS])
    taken = np.array([bits * size for size in sizes for bits in BITS], dtype=float)
    cells = np.arange(rise.size, dtype=np.int32)  # the oldest scipy's solver takes no longer indices
    one = csr_array((np.ones(rise.size), (cells // choices, cells)))
    total = max(float(taken.max()), 1.0)
    within = LinearConstraint(taken[None] / total, -np.inf, average * sum(sizes) / total * (1 + 1e-12))
    found = milp(
        rise / rise.max(),
        constraints=[LinearConstraint(one, 1, 1), within],
        integrality=np.ones(rise.size),
        bounds=Bounds(0, 1),
        options={"time_limit": _SECONDS, "mip_rel_gap": 1e-4},
    )
    if found.x is None:  # the average is the least there is, up to rounding
        return [min(BITS)] * count
    return [BITS[int(row.argmax())] for row in found.x.reshape(count, choices)]
