"""The best approximation of a derivative by a step function: borders and levels, by dynamic programming.

For f' on [-SPAN, SPAN] and k = 2^bits intervals it minimizes Σ ∫ (f'(x) - level_i)² dx over the borders. The best level of
an interval [a, b] is the mean of f' there, (f(b) - f(a)) / (b - a), and the interval costs ∫ f'² - (f(b) - f(a))² / (b - a).

Source: Novikov et al., "Few-bit Backward", ICML 2023 (arXiv 2202.00441), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

SPAN = 100.0
"""Where a derivative is approximated: beyond, it is that of the outermost intervals. As in the published tables."""
_REACH = 12.0
"""Where borders may lie at all: the derivatives of activations are constant beyond, to six digits."""
_SPACING = 0.05
_ROUNDS = 6
_NARROWING = 8
_NEAR = 16

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """A step function: ``levels[i]`` where x is above exactly i of the ``borders``, or of ``closed`` on one or above it.

    Beyond the last level they begin anew: i counts modulo their number.
    """

    borders: tuple[float, ...]
    levels: tuple[float, ...]
    closed: tuple[float, ...] = ()

    def at(self, x: torch.Tensor) -> torch.Tensor:
        """The level at each number, float64."""
        place = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        for border in self.borders:
            place += x > border
        for border in self.closed:
            place += x >= border
        return torch.tensor(self.levels, dtype=torch.float64, device=x.device)[place % len(self.levels)]


def best_steps(function: Function, bits: int) -> Steps:
    """The best step function of 2^bits levels for the derivative of ``function``, which is smooth or piecewise so."""
    count = 2**bits
    reach = torch.linspace(-_REACH, _REACH, int(2 * _REACH / _SPACING) + 1, dtype=torch.float64)
    borders = _chosen(function, reach, count)
    width = _SPACING
    for _ in range(_ROUNDS):
        near = torch.linspace(-width, width, 2 * _NEAR + 1, dtype=torch.float64)
        borders = _chosen(function, (borders[:, None] + near).flatten().unique(), count)
        width /= _NARROWING
    return Steps(tuple(borders.tolist()), tuple(mean_slopes(function, borders).tolist()))


def mean_slopes(function: Function, borders: torch.Tensor) -> torch.Tensor:
    """The mean of the derivative in each interval that the borders make of [-SPAN, SPAN]."""
    edges = torch.cat([borders.new_tensor([-SPAN]), borders, borders.new_tensor([SPAN])])
    return function(edges).diff() / edges.diff()


def _chosen(function: Function, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """The best ``count`` - 1 borders among candidates: D_k(j) = min_i D_(k-1)(i) + cost(i, j)."""
    edges = torch.cat([candidates.new_tensor([-SPAN]), candidates, candidates.new_tensor([SPAN])])
    cost = _costs(function, edges)
    best, came = cost[0], []
    for _ in range(count - 1):
        best, source = (best[:, None] + cost).min(0)
        came.append(source)
    place, places = len(edges) - 1, []
    for source in reversed(came):
        place = int(source[place])
        places.append(place)
    return edges[torch.tensor(places[::-1])]


def _costs(function: Function, edges: torch.Tensor) -> torch.Tensor:
    """What an interval from each edge to each later one costs; infinite where it is none."""
    values, squares = function(edges), _squares(function, edges)
    length = edges[None, :] - edges[:, None]
    rise = values[None, :] - values[:, None]
    cost = squares[None, :] - squares[:, None] - rise.square() / length
    return torch.where(length > 0, cost, torch.inf)


def _squares(function: Function, edges: torch.Tensor) -> torch.Tensor:
    """∫ f'² from the first edge to each, by Gauss and Legendre's rule of three points in fine cells."""
    fine = torch.linspace(-SPAN, SPAN, int(2 * SPAN / _SPACING) + 1, dtype=torch.float64)
    cells = torch.cat([fine, edges]).unique()
    middle, half = (cells[1:] + cells[:-1]) / 2, cells.diff() / 2
    offset, outer, inner = (3 / 5) ** 0.5, 5 / 9, 8 / 9
    points = torch.stack([middle - offset * half, middle, middle + offset * half]).requires_grad_()
    (slope,) = torch.autograd.grad(function(points).sum(), points)
    weights = slope.new_tensor([outer, inner, outer])[:, None]
    sums = torch.cat([half.new_zeros(1), ((weights * slope.square()).sum(0) * half).cumsum(0)])
    return sums[torch.searchsorted(cells, edges)]
