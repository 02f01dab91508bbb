"""The best approximation of a derivative by a step function: borders and levels, by dynamic programming.

For f' on [-SPAN, SPAN] and k = 2^bits intervals it minimizes Σ ∫ (f'(x) - level_i)² dx over the borders. The best level of
an interval [a, b] is the mean of f' there, (f(b) - f(a)) / (b - a), and the interval costs ∫ f'² - (f(b) - f(a))² / (b - a).
With a density w of x it minimizes Σ ∫ w (f'(x) - level_i)² dx: the means are those under w.

Source: Novikov et al., "Few-bit Backward", ICML 2023 (arXiv 2202.00441), section 3.
"""

from __future__ import annotations

import itertools
import math
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
_MOST = 20
"""How often borders move by a width at most: many that lie close hinder each other."""

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


@dataclass(frozen=True)
class Density:
    """How often values are met: 9 of 10 from a normal distribution, one from one that is twice as wide, since training moves
    it; and next to nothing everywhere, so that each interval has a mean.
    """

    mean: float
    deviation: float

    def at(self, x: torch.Tensor) -> torch.Tensor:
        """w(x)."""
        return 0.9 * self._normal(x, 1) + 0.1 * self._normal(x, 2) + 1e-6

    def _normal(self, x: torch.Tensor, wider: float) -> torch.Tensor:
        deviation = wider * max(self.deviation, _SPACING)
        return (-0.5 * ((x - self.mean) / deviation).square()).exp() / (deviation * math.sqrt(2 * math.pi))


def best_steps(function: Function, bits: int, density: Density | None = None) -> Steps:
    """The best step function of 2^bits levels for the derivative of ``function``, which is smooth or piecewise so.

    Borders are chosen among points of a coarse grid first, then each among ever nearer ones around it.
    """
    reach = torch.linspace(-_REACH, _REACH, int(2 * _REACH / _SPACING) + 1, dtype=torch.float64)
    borders = _chosen(function, reach.expand(2**bits - 1, -1), density)
    for width in (_SPACING / _NARROWING**k for k in range(_ROUNDS)):
        near = torch.linspace(-width, width, 2 * _NEAR + 1, dtype=torch.float64)
        for _ in range(_MOST):
            before, borders = borders, _chosen(function, borders[:, None] + near, density)
            if torch.equal(before, borders):
                break
    return Steps(tuple(borders.tolist()), tuple(mean_slopes(function, borders, density).tolist()))


def mean_slopes(function: Function, borders: torch.Tensor, density: Density | None = None) -> torch.Tensor:
    """The mean of the derivative in each interval that the borders make of [-SPAN, SPAN]."""
    edges = _edges(borders)
    if density is None:
        return function(edges).diff() / edges.diff()
    weight, slope, _ = _integrals(function, edges, density)
    return slope.diff() / weight.diff()


def _edges(borders: torch.Tensor) -> torch.Tensor:
    return torch.cat([borders.new_tensor([-SPAN]), borders, borders.new_tensor([SPAN])])


def _chosen(function: Function, candidates: torch.Tensor, density: Density | None) -> torch.Tensor:
    """The best borders [k], each of its own candidates [k, m], rising: D_i(c) = min_b D_(i-1)(b) + cost(b, c)."""
    start, *rows, end = _measures(function, candidates, density)
    best, came = _costs(start, rows[0])[0], []
    for before, after in itertools.pairwise(rows):
        best, source = (best[:, None] + _costs(before, after)).min(0)
        came.append(source)
    place = int((best[:, None] + _costs(rows[-1], end)).argmin())
    places = [place]
    for source in reversed(came):
        place = int(source[place])
        places.append(place)
    return candidates[torch.arange(len(candidates)), torch.tensor(places[::-1])]


def _costs(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What an interval from each point to each other one costs, by their measures; infinite where it is none."""
    weight, rise, square = after[:, None, :] - before[:, :, None]
    return torch.where(weight > 0, square - rise.square() / weight, torch.inf)


def _measures(function: Function, candidates: torch.Tensor, density: Density | None) -> list[torch.Tensor]:
    """∫ w, ∫ w f' and ∫ w f'² [3, m] from the start to each candidate, row by row, between those of the two ends."""
    edges = _edges(candidates.flatten())
    found = torch.stack(_integrals(function, edges, density))
    if density is None:
        found[:2] = torch.stack([edges, function(edges)])
    rows = found[:, 1:-1].view(3, *candidates.shape)
    return [found[:, :1], *rows.unbind(1), found[:, -1:]]


def _integrals(function: Function, edges: torch.Tensor, density: Density | None) -> list[torch.Tensor]:
    """∫ w, ∫ w f' and ∫ w f'² from -SPAN to each edge, by Gauss and Legendre's rule of three points in fine cells."""
    fine = torch.linspace(-SPAN, SPAN, int(2 * SPAN / _SPACING) + 1, dtype=torch.float64)
    cells = torch.cat([fine, edges]).unique()
    middle, half = (cells[1:] + cells[:-1]) / 2, cells.diff() / 2
    offset, outer, inner = (3 / 5) ** 0.5, 5 / 9, 8 / 9
    points = torch.stack([middle - offset * half, middle, middle + offset * half]).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(function(points).sum(), points)
    weights = slope.new_tensor([outer, inner, outer])[:, None]
    weights = weights if density is None else weights * density.at(points.detach())
    found = []
    for values in (weights.expand_as(slope), weights * slope, weights * slope.square()):
        sums = torch.cat([half.new_zeros(1), (values.sum(0) * half).cumsum(0)])
        found.append(sums[torch.searchsorted(cells, edges)])
    return found
