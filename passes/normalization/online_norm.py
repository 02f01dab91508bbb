"""Online normalization: each sample by the statistics of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewrite.analysis.sites import Site, sites
from rewrite.axes.followers import Follower, moves_along
from rewrite.graph.like import like
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.replacing import Replacing
from rewrite.torch_private import _BatchNorm

if TYPE_CHECKING:
    from rewrite.graph.program import Program


class OnlineNorm(nn.Module):
    """y_t = weight ∘ (x_t - mean) / √(var + eps) + bias for sample t of [N, C, ...], with the statistics of those before it.

    ``running_mean`` and ``running_var`` [C] move with every sample of training by 1 - ``decay``; ``control_y`` and
    ``control_x`` [C] are what the gradient is corrected by, which move with every sample of a backward.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: torch.Tensor
    running_var: torch.Tensor
    control_y: torch.Tensor
    control_x: torch.Tensor
    decay: float
    decay_back: float
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2) if x.dim() > 2 else x[..., None]
        if self.training:
            mean, scale = self._moved(flat.detach())
            controls = self.control_y, self.control_x
            u: torch.Tensor = _Controlled.apply(flat, mean[..., None], scale[..., None], *controls, 1 - self.decay_back)
        else:
            u = (flat - self.running_mean[:, None]) * (self.running_var + self.eps).rsqrt()[:, None]
        if self.weight is not None and self.bias is not None:
            u = u * self.weight[:, None] + self.bias[:, None]
        return u.reshape(x.shape)

    def _moved(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and 1 / √(var + eps) before each sample, [N, C]; the running ones move past all of them."""
        variances, means = torch.var_mean(x, 2, correction=0)
        mean, variance, found = self.running_mean.clone(), self.running_var.clone(), []
        for sample_mean, sample_variance in zip(means.unbind(), variances.unbind(), strict=True):
            found.append((mean, (variance + self.eps).rsqrt()))
            spread = sample_variance + self.decay * (sample_mean - mean).square()
            variance = (self.decay * variance + (1 - self.decay) * spread).to(variance.dtype)
            mean = (self.decay * mean + (1 - self.decay) * sample_mean).to(mean.dtype)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        return torch.stack([m for m, _ in found]), torch.stack([s for _, s in found])


moves_along(OnlineNorm, *(Follower(name, "running_mean", of_gradients=True) for name in ("control_y", "control_x")))


class _Controlled(torch.autograd.Function):
    """u = (x - mean) ∘ scale; the backward goes through the samples in their order and moves both controls."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, *given: Any) -> torch.Tensor:
        u = (x - mean) * scale
        ctx.save_for_backward(u, scale)
        ctx.controls, ctx.rate = given[:2], given[2]
        return u

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, scale = ctx.saved_tensors
        along_y, along_x = ctx.controls
        found = []
        for grad, sample, factor in zip(grads[0].unbind(), u.unbind(), scale.unbind(), strict=True):
            straight = grad - ctx.rate * along_y[:, None] * sample
            along_y.add_((straight * sample).mean(1))
            centered = straight * factor - ctx.rate * along_x[:, None]
            along_x.add_(centered.mean(1))
            found.append(centered)
        return torch.stack(found).to(u.dtype), None, None, None, None, None


@dataclass(frozen=True)
class OnlineNormPass(Replacing):
    """Replace BatchNorm with online normalization: y_t = gamma (x_t - mean) / √(var + eps) + beta, sample by sample.

    In training sample t is normalized by mean and variance of all samples before it, with a weight that decays by `decay`
    a sample: var = a var + (1 - a) (var(x_t) + a (mean(x_t) - mean)²), mean = a mean + (1 - a) mean(x_t), where mean(x_t)
    and var(x_t) are of one channel's positions. There is no batch. The gradient g of u = (x - mean) / √(var + eps) is made
    orthogonal to u and to 1 in the same way: g' = g - (1 - b) e_y u, e_y += mean(g' u), dx = g' / √(var + eps) -
    (1 - b) e_x, e_x += mean(dx), with b = `decay_back`. Statistics start at the BatchNorm's, as do gamma, beta and eps.

    It goes through a batch one by one, and is slow where batches are large. The paper's layer scaling, against growing
    activations, is not part of it. Left alone, with the reason: norms called more than once or without running statistics.

    Source: Chiley et al., "Online Normalization for Training Neural Networks", NeurIPS 2019 (arXiv 1905.05894), section 3.
    """

    name = "online-norm"
    inserts = (OnlineNorm,)
    absence = "no layer of it is a BatchNorm with running statistics"
    decay: float = option(0.999, "decay of the statistics with each sample", above=0, below=1)
    decay_back: float = option(0.99, "decay of the gradient's control", above=0, below=1)

    def places(self, program: Program) -> Sequence[Site]:
        return sites(program, _BatchNorm)

    def obstacle(self, place: Site, program: Program) -> str:
        if sum(node.target == place.path for node, _ in program.layers()) > 1:
            return "it is called more than once"
        return "" if place.layer.running_mean is not None else "it has no running statistics"

    def layer_for(self, place: Site) -> OnlineNorm:
        controls = {name: torch.zeros_like(place.layer.running_mean) for name in ("control_y", "control_x")}
        decays = {"decay": self.decay, "decay_back": self.decay_back}
        return like(place.layer, OnlineNorm, num_batches_tracked=None, **decays, **controls)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Sample by sample, with the corrections of the gradient where it comes back to u."""
        assert isinstance(new, OnlineNorm)
        x = inputs[0].reshape(*inputs[0].shape[:2], -1)
        parts, deviations = [], []
        for sample in x.split(1):
            deviation = (new.running_var[:, None] + new.eps) ** 0.5
            parts.append((sample - new.running_mean[:, None].clone()) / deviation)
            deviations.append(deviation.clone())
            if new.training:
                _follow(new, sample[0].detach())
        u = torch.cat(parts)
        if new.training and u.requires_grad:
            u.register_hook(_correction(u.detach(), deviations, new))
        if new.weight is not None and new.bias is not None:
            u = u * new.weight[:, None] + new.bias[:, None]
        return u.reshape(inputs[0].shape)


def _follow(norm: OnlineNorm, sample: torch.Tensor) -> None:
    """The statistics after one more sample [C, positions]."""
    a, away = norm.decay, sample.mean(1) - norm.running_mean
    own = (sample - sample.mean(1, keepdim=True)).square().mean(1)
    norm.running_var.copy_(a * norm.running_var + (1 - a) * own + a * (1 - a) * away * away)
    norm.running_mean.copy_(norm.running_mean + (1 - a) * away)


def _correction(u: torch.Tensor, deviations: Sequence[torch.Tensor], norm: OnlineNorm) -> Any:
    def correct(grad: torch.Tensor) -> torch.Tensor:
        rate, found = 1 - norm.decay_back, []
        for g, own, deviation in zip(grad, u, deviations, strict=True):
            orthogonal = g - rate * norm.control_y[:, None] * own
            back = orthogonal / deviation - rate * norm.control_x[:, None]
            norm.control_y.copy_(norm.control_y + (orthogonal * own).mean(1))
            norm.control_x.copy_(norm.control_x + back.mean(1))
            found.append(back * deviation)
        return torch.stack(found)

    return correct
