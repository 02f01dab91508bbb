"""Element-wise functions in place of norms, fitted to what the norms give on data: y = weight · f(scale · x) + bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from rewrite.graph.program import Program
from rewrite.numerics.running import Reducer

from .norms import Norm
from .observe import Progress, Watched, observe

Method = Literal["lsq", "formula"]

_GRID = torch.logspace(-2, 6, 33, base=2.0, dtype=torch.float64)
"""The scales that least squares tries, as multiples of the formula's on the first item of the data."""


@dataclass(frozen=True)
class Curve:
    """An odd function f that rises to 1, and its scale from C channels, the m that the norm's output is bounded by
    (|n(x)| < √m: C - 1 of a LayerNorm, C of an RMSNorm) and the harmonic mean σ of the tokens' deviations.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    scale: Callable[[int, int, float], float]


TANH = Curve(torch.tanh, lambda c, m, sigma: math.sqrt(m) / (c * sigma))
ERF = Curve(torch.erf, lambda c, m, sigma: math.sqrt(math.pi * m) / (2 * c * sigma))
ROOT = Curve(lambda u: u / (1 + u.square()).sqrt(), lambda c, m, sigma: 1 / (math.sqrt(c) * sigma))


@dataclass(frozen=True)
class Fit:
    """What a norm becomes: weight · f(scale · x) + bias, float64 of the norm's shape (no bias where the norm has none).

    ``error`` is the root of the mean square of what is missing, over that of the norm's output, on the data.
    """

    scale: float
    weight: torch.Tensor
    bias: torch.Tensor | None
    error: float


def calibrated(
    program: Program,
    norms: Sequence[Norm],
    curve: Curve,
    method: Method,
    data: Any,
    *,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
) -> dict[str, Fit]:
    """The fit of each norm, by its path.

    ``lsq``: of a grid of scales the one with the least squared error, weight and bias of each channel by linear
    regression on the norm's own output. ``formula``: the scale from the harmonic mean of the tokens' deviations, the
    weight times √m (see ``Curve``), and the bias as it is: f then is the norm of one coordinate with the others fixed.
    """
    if method == "lsq":
        fits = _shown(program, norms, lambda norm: _Regression(curve, norm), data, progress, seed)
        return {path: found.fit() for path, found in fits.items()}
    spreads = _shown(program, norms, _Spread, data, progress, seed)
    gaps = {path: _Gap(curve, found.norm, _by_formula(curve, found)) for path, found in spreads.items()}
    _shown(program, norms, lambda norm: gaps[norm.path], data, progress, seed)
    return {path: gap.fit() for path, gap in gaps.items()}


def _shown(
    program: Program,
    norms: Sequence[Norm],
    make: Callable[[Norm], Any],
    data: Any,
    progress: Progress,
    seed: int,
) -> dict[str, Any]:
    """A reducer for each path, shown the inputs and outputs of every call of the norm there."""
    made: dict[str, Any] = {}
    watched: dict[Watched, Reducer] = {}
    for norm in norms:
        if norm.path not in made:
            made[norm.path] = make(norm)
        source = norm.node.args[0]
        assert isinstance(source, Node)
        watched[source, norm.node] = made[norm.path]
    observe(program, watched, data, progress=progress, seed=seed)
    return made


def _tokens(value: torch.Tensor, norm: Norm) -> torch.Tensor:
    """A value as float64 [tokens, channels]: what is normalized together is one row."""
    moved = value.movedim(norm.channel_axis, -1) if norm.channel_axis != -1 else value
    return moved.double().reshape(-1, _channels(norm))


def _channels(norm: Norm) -> int:
    return math.prod(norm.shape)


def _bound(norm: Norm) -> int:
    """m: the norm of one coordinate, the others fixed, stays below √m."""
    return max(_channels(norm) - (norm.kind == "layer"), 1)


def _harmonic(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Σ 1/σ over tokens, σ² the variance (of an RMSNorm: the mean square) with the norm's eps."""
    square = x.var(1, correction=0) if norm.kind == "layer" else x.square().mean(1)
    return (square + (norm.eps or 0.0)).clamp(min=1e-30).rsqrt().sum()


class _Spread:
    """The harmonic mean of the tokens' deviations."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm
        self.count, self.inverse = 0, 0.0

    def update(self, *values: torch.Tensor) -> None:
        x = _tokens(values[0], self.norm)
        self.count += len(x)
        self.inverse += float(_harmonic(x, self.norm))

    @property
    def sigma(self) -> float:
        return self.count / self.inverse if self.inverse else 1.0


def _by_formula(curve: Curve, found: _Spread) -> Fit:
    norm = found.norm
    scale = curve.scale(_channels(norm), _bound(norm), found.sigma)
    weight = torch.ones(_channels(norm), dtype=torch.float64) if norm.weight is None else norm.weight.detach().double()
    bias = None if norm.bias is None else norm.bias.detach().double().cpu()
    return Fit(scale, math.sqrt(_bound(norm)) * weight.cpu().reshape(norm.shape), bias, math.nan)


class _Gap:
    """How far a fit is from the norm."""

    def __init__(self, curve: Curve, norm: Norm, given: Fit) -> None:
        self.curve, self.norm, self.given = curve, norm, given
        self.missing = self.whole = 0.0

    def update(self, *values: torch.Tensor) -> None:
        x, y = (_tokens(value, self.norm) for value in values)
        made = self.curve.function(self.given.scale * x) * self.given.weight.reshape(-1).to(x.device)
        if self.given.bias is not None:
            made = made + self.given.bias.reshape(-1).to(x.device)
        self.missing += float((made - y).square().sum())
        self.whole += float(y.square().sum())

    def fit(self) -> Fit:
        return Fit(self.given.scale, self.given.weight, self.given.bias, _relative(self.missing, self.whole))


class _Regression:
    """Sums for the linear regression of a norm's output on f(scale · x), for each scale of a grid and each channel."""

    def __init__(self, curve: Curve, norm: Norm) -> None:
        self.curve, self.norm = curve, norm
        self.scales: torch.Tensor = torch.empty(0)
        self.count = 0
        self.sums: Mapping[str, torch.Tensor] = {}

    def update(self, *values: torch.Tensor) -> None:
        x, y = (_tokens(value, self.norm) for value in values)
        if not len(x):
            return
        if not self.count:
            sigma = len(x) / float(_harmonic(x, self.norm))
            self.scales = _GRID * self.curve.scale(_channels(self.norm), _bound(self.norm), sigma)
        found = {"y": y.sum(0), "yy": y.square().sum(0)}
        curves = [self.curve.function(float(scale) * x) for scale in self.scales]
        found["t"] = torch.stack([t.sum(0) for t in curves])
        found["tt"] = torch.stack([t.square().sum(0) for t in curves])
        found["ty"] = torch.stack([(t * y).sum(0) for t in curves])
        self.sums = {name: value.cpu() + self.sums.get(name, 0.0) for name, value in found.items()}
        self.count += len(x)

    def fit(self) -> Fit:
        """The best scale with its weight and bias."""
        t, tt, ty, y, yy = (self.sums[name] for name in ("t", "tt", "ty", "y", "yy"))
        n, with_bias = self.count, self.norm.bias is not None
        over, under = (n * ty - t * y, n * tt - t.square()) if with_bias else (ty, tt)
        flat = under <= 1e-12 * n * tt  # a channel that hardly moves: the bias alone
        weight = torch.where(flat, 0.0, over / torch.where(flat, 1.0, under))
        bias = (y - weight * t) / n if with_bias else torch.zeros_like(weight)
        missing = (yy - weight * ty - bias * y).clamp(min=0).sum(1)
        best = int(missing.argmin())
        shaped = bias[best].reshape(self.norm.shape) if with_bias else None
        error = _relative(float(missing[best]), float(yy.sum()))
        return Fit(float(self.scales[best]), weight[best].reshape(self.norm.shape), shaped, error)


def _relative(missing: float, whole: float) -> float:
    return math.sqrt(missing / whole) if whole else 0.0
