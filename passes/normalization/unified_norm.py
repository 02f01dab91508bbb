"""Unified normalization: each channel divided by a quadratic mean that is smoothed over a window of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.analysis.norms import Norm
from rewrite.analysis.running_norm import RunningSquareNorm, rows
from rewrite.axes.followers import Follower, moves_along
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.running_norms import RunningNorms, Statistics, buffer, weight_of


class UnifiedNorm(RunningSquareNorm):
    """y = weight ∘ x / √(square + eps) + bias; in training with the geometric mean of the last ``window`` mean squares.

    ``square`` [C] is the running one, ``squares`` and ``controls`` [window, C] hold the last steps' mean squares and
    gradient statistics, ``count`` the steps so far.
    """

    squares: torch.Tensor
    controls: torch.Tensor
    count: torch.Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        square: torch.Tensor,
        eps: float,
        window: int,
        momentum: float,
        outlier: float,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.register_buffer("square", square)
        for name in ("squares", "controls"):
            self.register_buffer(name, torch.zeros(window, *square.shape, dtype=square.dtype, device=square.device))
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=square.device))
        self.eps, self.momentum, self.outlier = eps, momentum, outlier
        self.normalized_shape = tuple(weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.evaluated(x)
        with torch.no_grad():
            place = self.count % len(self.squares)
            now = rows(x).square().mean(0).to(self.squares.dtype)
            self.squares.index_copy_(0, place.reshape(1), now[None])
            self.count.add_(1)
            used = window_mask(self.squares, self.count)
            steps = used.sum()
            arithmetic = (self.squares * used).sum(0) / steps
            geometric = (((self.squares + self.eps).log() * used).sum(0) / steps).exp() - self.eps
            smooth = torch.where(arithmetic > (1 + self.outlier) * (geometric + self.eps), now, geometric)
            self.square.lerp_(smooth, self.momentum)
        u: torch.Tensor = _Smoothed.apply(x, (smooth + self.eps).rsqrt(), self.controls, place, used / steps)
        return u * self.weight if self.bias is None else u * self.weight + self.bias


moves_along(UnifiedNorm, Follower("squares", "square", 1), Follower("controls", "square", 1, of_gradients=True))


def window_mask(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """1 for the rows of a window that ``count`` steps have filled, else 0, [window, 1]."""
    return (torch.arange(len(values), device=values.device) < count).to(values.dtype)[:, None]


class _Smoothed(torch.autograd.Function):
    """u = x ∘ scale with dx = (du - c ∘ u) ∘ scale, c the mean over the window of mean(du u); the backward fills it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, controls: torch.Tensor, place: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        u = x * scale
        ctx.save_for_backward(u, scale, place, shares)
        ctx.controls = controls
        return u

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, scale, place, shares = ctx.saved_tensors
        now = (rows(grads[0]) * rows(u)).mean(0).to(ctx.controls.dtype)
        ctx.controls.index_copy_(0, place.reshape(1), now[None])
        control = (ctx.controls * shares).sum(0)
        return (grads[0] - control * u) * scale, None, None, None, None


@dataclass(frozen=True)
class UnifiedNormPass(RunningNorms):
    """Replace norms with unified normalization: y = weight * x / √(q + eps) + bias, q smoothed over a window of steps.

    In training q is the geometric mean, for each channel, of the last `window` batches' mean x² (this one included), which
    a single large one moves less than it would an arithmetic mean. Where the arithmetic mean exceeds the geometric one by
    more than `outlier`, relative, the window is no estimate and the batch's own mean square counts. In the gradient,
    dx = (du - c u) / √(q + eps) with u = x / √(q + eps) and c the mean over the window of mean(du u). In evaluation q is the
    running mean of the smoothed values: an affine map, which `merge-norms` folds into the layers that read it. It starts at
    the mean square of what the norm is given on data, or at 1 without.

    Left alone, with the reason: norms over another axis than the last.

    Source: Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers", ACM MM 2022
    (arXiv 2208.01313), section 3. From memory of the paper: that outliers are told by how far arithmetic and geometric
    mean are apart is its idea, the threshold taken here could not be checked; there is no warm-up.
    """

    name = "unified-norm"
    inserts = (UnifiedNorm,)
    window: int = option(4, "steps that statistics are smoothed over", at_least=1)
    momentum: float = option(0.1, "by how much the running mean square moves in a step", above=0, below=1)
    outlier: float = option(0.5, "by how much the arithmetic mean may exceed the geometric one", above=0)

    def layer_with(self, place: Norm, start: Statistics) -> UnifiedNorm:
        eps = 1e-5 if place.eps is None else place.eps
        square = buffer(start.square, place)
        return UnifiedNorm(weight_of(place), place.bias, square, eps, self.window, self.momentum, self.outlier)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Step by step: the window as a list, its two means, the gradient corrected on its way back."""
        assert isinstance(new, UnifiedNorm)
        if not new.training:
            u = inputs[0] / (new.square + new.eps) ** 0.5
            return u * new.weight if new.bias is None else u * new.weight + new.bias
        step, window = int(new.count), len(new.squares)
        now = (inputs[0].detach().flatten(0, -2) ** 2).mean(0)
        new.squares[step % window] = now
        new.count.add_(1)
        last = list(new.squares[: min(step + 1, window)])
        arithmetic, product = sum(last) / len(last), torch.stack([q + new.eps for q in last]).prod(0)
        geometric = product ** (1 / len(last))
        q = torch.where(arithmetic > (1 + new.outlier) * geometric, now, geometric - new.eps)
        new.square.copy_((1 - new.momentum) * new.square + new.momentum * q)
        u = inputs[0] / (q + new.eps) ** 0.5
        if u.requires_grad:
            u.register_hook(_correction(u.detach(), new, step))
        return u * new.weight if new.bias is None else u * new.weight + new.bias


def _correction(u: torch.Tensor, norm: UnifiedNorm, step: int) -> Any:
    def correct(grad: torch.Tensor) -> torch.Tensor:
        window = len(norm.controls)
        norm.controls[step % window] = (grad * u).flatten(0, -2).mean(0)
        return grad - norm.controls[: min(step + 1, window)].mean(0) * u

    return correct
