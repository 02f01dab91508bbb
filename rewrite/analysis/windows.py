"""A row of blocks cut into windows of those that depend least on each other."""

from __future__ import annotations

from collections.abc import Sequence


def cut(matrix: Sequence[Sequence[float]], window: int, most: float) -> list[tuple[int, int]]:
    """The parts [start, end) of a row of blocks: the fewest, and of these those with the least Σ M_ij within them.

    By recursion over where the last part begins; of equal ones that whose first parts are longest. No part is longer than
    ``window``, or has an M_ij above ``most``.
    """
    best: list[tuple[int, float, list[tuple[int, int]]]] = [(0, 0.0, [])]
    for end in range(1, len(matrix) + 1):
        found = []
        for start in range(max(0, end - window), end):
            within = [matrix[i][j] for i in range(start, end) for j in range(i + 1, end)]
            if max(within, default=0.0) <= most:
                count, total, parts = best[start]
                found.append((count + 1, total + sum(within), [*parts, (start, end)]))
        best.append(min(found, key=lambda each: (*each[:2], [-end for _, end in each[2]])))
    return best[-1][2]
