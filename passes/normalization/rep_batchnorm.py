"""From LayerNorm to a re-parameterized BatchNorm, step by step (PRepBN)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.analysis.norms import Kind, Norm
from rewrite.analysis.running_norm import RunningNorm, rows
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.running_norms import RunningNorms, Statistics, buffer, weight_of


class RepBatchNorm(RunningNorm):
    """y = s · (weight ∘ n(x) + bias) + (1 - s) · (batch_weight ∘ b(x) + batch_bias + alpha x), s falling from 1 to 0.

    n is the norm that stood there (``kind`` layer or rms), b normalizes each channel by statistics of the batch, in
    evaluation by ``running_mean`` and ``running_var`` [C]. s = 1 - steps / total, where ``steps`` counts those of training.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        kind: Kind,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
        momentum: float,
        total: int,
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.momentum, self.total = kind, eps, momentum, total
        self.normalized_shape = tuple(weight.shape)
        self.weight = weight
        self.register_parameter("bias", bias)
        start = torch.zeros_like(weight) if bias is None else bias.detach().clone()
        self.batch_weight, self.batch_bias = nn.Parameter(weight.detach().clone()), nn.Parameter(start)
        self.alpha = nn.Parameter(torch.ones(1, dtype=weight.dtype, device=weight.device))
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", variance)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = (1 - self.steps / self.total).clamp(min=0).to(x.dtype)
        if self.training:
            self.steps.add_(1)
            statistics = self.running_mean, self.running_var
            flat = F.batch_norm(rows(x), *statistics, self.batch_weight, self.batch_bias, True, self.momentum, self.eps)
            new = flat.reshape(x.shape) + self.alpha * x
        else:
            new = self.evaluated(x)
        if self.kind == "layer":
            old = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            old = F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
            old = old if self.bias is None else old + self.bias
        return share * old + (1 - share) * new

    def sources(self) -> tuple[str, ...]:
        return "batch_weight", "batch_bias", "running_mean", "running_var", "alpha"

    @staticmethod
    def affine_map(eps: float, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias, mean, variance, alpha = tensors
        scale = weight * (variance + eps).rsqrt()
        return scale + alpha, bias - scale * mean

    def unsettled(self) -> str:
        if self.steps.is_meta:
            return "its schedule is not known to be over: it has no values"
        steps = int(self.steps)
        return "" if steps >= self.total else f"its schedule is not over: step {steps} of {self.total}"


@dataclass(frozen=True)
class RepBatchNormPass(RunningNorms):
    """Replace norms with PRepBN: s n(x) + (1 - s) (BN(x) + alpha x), with s falling from 1 to 0 while it trains.

    n is the norm that stood there, BN one over all tokens of the batch, alpha a trained number that starts at 1. s is
    1 - k / `schedule` after k training steps, which a buffer of the layer counts: no callback is needed. Before the first
    step the function in evaluation is the same. At the end it is an affine map in evaluation, which `merge-norms` folds
    into the layers that read it: scale gamma / √(var + eps) + alpha, shift beta - gamma mean / √(var + eps). gamma and beta
    start as copies of the norm's weight and bias, running statistics at those of what the norm is given on data, or at 0
    and 1.

    Left alone, with the reason: norms over another axis than the last.

    Source: Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized
    Batch Normalization", ICML 2024 (arXiv 2405.11582), equations 3 to 5.
    """

    name = "rep-batchnorm"
    inserts = (RepBatchNorm,)
    schedule: int = option(10000, "training steps after which the old norm is gone", at_least=1)
    momentum: float = option(0.1, "by how much running statistics move in a step", above=0, at_most=1)

    def layer_with(self, place: Norm, start: Statistics) -> RepBatchNorm:
        eps = 1e-5 if place.eps is None else place.eps
        mean, variance = buffer(start.mean, place), buffer(start.variance, place)
        return RepBatchNorm(place.kind, weight_of(place), place.bias, mean, variance, eps, self.momentum, self.schedule)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Both norms by their definitions, and the mixture of the step."""
        assert isinstance(new, RepBatchNorm)
        x = inputs[0]
        share = max(0.0, 1 - int(new.steps) / new.total)
        flat = x.flatten(0, -2)
        mean, variance = flat.mean(0), flat.var(0, correction=0)
        if new.training:
            new.steps.add_(1)
            spread = variance.detach() * len(flat) / max(len(flat) - 1, 1)
            new.running_mean.copy_((1 - new.momentum) * new.running_mean + new.momentum * mean.detach())
            new.running_var.copy_((1 - new.momentum) * new.running_var + new.momentum * spread)
        else:
            mean, variance = new.running_mean, new.running_var
        batch = (x - mean) / (variance + new.eps) ** 0.5 * new.batch_weight + new.batch_bias + new.alpha * x
        away = x - x.mean(-1, keepdim=True) if new.kind == "layer" else x
        token = away / ((away * away).mean(-1, keepdim=True) + new.eps) ** 0.5 * new.weight
        token = token if new.bias is None else token + new.bias
        return share * token + (1 - share) * batch
