"""PowerNorm: each channel divided by a running quadratic mean."""

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


class PowerNorm(RunningSquareNorm):
    """y = weight ∘ x / √(square + eps) + bias.

    ``square`` [C] is the running mean of x², ``control`` [C] what the gradient is corrected by.
    """

    control: torch.Tensor

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, square: torch.Tensor, eps: float, momentum: float
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.register_buffer("square", square)
        self.register_buffer("control", torch.zeros_like(square))
        self.eps = eps
        self.momentum = momentum
        self.normalized_shape = tuple(weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.evaluated(x)
        scale = (self.square + self.eps).rsqrt()
        u: torch.Tensor = _Normalized.apply(x, scale, self.control, self.momentum)
        with torch.no_grad():
            self.square.lerp_(rows(x).square().mean(0).to(self.square.dtype), self.momentum)
        return u * self.weight if self.bias is None else u * self.weight + self.bias


moves_along(PowerNorm, Follower("control", "square", of_gradients=True))


class _Normalized(torch.autograd.Function):
    """u = x ∘ scale with dx = (du - control ∘ u) ∘ scale; the backward moves ``control``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, control: torch.Tensor, momentum: float) -> torch.Tensor:
        u = x * scale
        ctx.save_for_backward(u, scale)
        ctx.control, ctx.momentum = control, momentum
        return u

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, scale = ctx.saved_tensors
        found = (grads[0] - ctx.control * u) * scale
        gamma, across = rows(u).square().mean(0), (rows(grads[0]) * rows(u)).mean(0)
        ctx.control.mul_(1 - ctx.momentum * gamma).add_(ctx.momentum * across)
        return found, None, None, None


@dataclass(frozen=True)
class PowerNormPass(RunningNorms):
    """Replace norms with PowerNorm: y = weight * x / √(q + eps) + bias, with q a running mean of x² for each channel.

    No mean is taken out, and no statistic of the token: in evaluation it is an affine map, which `merge-norms` folds into
    the layers that read it. In training a batch is divided by the q before it, then q moves towards the batch's mean square
    by `momentum`. The gradient is the paper's approximation: with u = x / √(q + eps) and du its gradient,
    dx = (du - v u) / √(q + eps), and v moves by momentum (mean(du u) - v mean(u²)). v starts at 0, q at the mean square of
    what the norm is given on data, or at 1 without. Weight, bias and eps are the norm's.

    Left alone, with the reason: norms over another axis than the last.

    Source: Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020 (arXiv 2003.07845),
    algorithms 1 and 2. The formulas are from memory of the paper and could not be checked against it; eps is added here,
    and there is no warm-up by the batch's own statistics.
    """

    name = "power-norm"
    inserts = (PowerNorm,)
    momentum: float = option(0.1, "by how much running statistics move towards a batch's", above=0, below=1)

    def layer_with(self, place: Norm, start: Statistics) -> PowerNorm:
        square = buffer(start.square, place)
        return PowerNorm(weight_of(place), place.bias, square, 1e-5 if place.eps is None else place.eps, self.momentum)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """u = x / ψ with the gradient of u corrected on its way back, and statistics that follow."""
        assert isinstance(new, PowerNorm)
        psi = (new.square + new.eps) ** 0.5
        u = inputs[0] / psi.clone()
        if new.training:
            if u.requires_grad:
                u.register_hook(_correction(u.detach(), new))
            flat = inputs[0].detach().flatten(0, -2)
            new.square.copy_((1 - new.momentum) * new.square + new.momentum * (flat**2).mean(0))
        return u * new.weight if new.bias is None else u * new.weight + new.bias


def _correction(u: torch.Tensor, norm: PowerNorm) -> Any:
    def correct(grad: torch.Tensor) -> torch.Tensor:
        before, axes = norm.control.clone(), tuple(range(u.dim() - 1))
        moved = norm.momentum * ((grad * u).mean(axes) - before * (u * u).mean(axes))
        norm.control.copy_(before + moved)
        return grad - before * u

    return correct
