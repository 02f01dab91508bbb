"""EvoNorm in place of batch normalization and the activation behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rewrite.analysis.kinds import is_activation
from rewrite.analysis.sites import Site, sites
from rewrite.graph.like import like
from rewrite.graph.nodes import tensor_value
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.replacing import Replacing
from rewrite.torch_private import _BatchNorm

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context
    from rewrite.proof.part import Part


class EvoNorm(nn.Module):
    """What the forms share: weight and bias [C] of the BatchNorm, ``gate`` v [C], eps. x is [N, C, ...]."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    gate: nn.Parameter
    eps: float

    def along(self, parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A vector of the channels, along those of x."""
        return parameter.reshape(-1, *[1] * (x.dim() - 2))

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        """weight * y + bias."""
        if self.weight is None or self.bias is None:
            return y
        return y * self.along(self.weight, y) + self.along(self.bias, y)


class EvoNormB0(EvoNorm):
    """y = gamma x / max(√(var_b + eps), v x + √(var_i + eps)) + beta; in evaluation var_b is ``running_var``."""

    running_var: torch.Tensor
    momentum: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = self.running_var
        if self.training:
            variance = x.var((0, *range(2, x.dim())), correction=0)
            with torch.no_grad():
                self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        instance = x.var(tuple(range(2, x.dim())), correction=0, keepdim=True)
        batch = self.along((variance + self.eps).sqrt(), x)
        return self.scaled(x / torch.maximum(batch, self.along(self.gate, x) * x + (instance + self.eps).sqrt()))


class EvoNormS0(EvoNorm):
    """y = gamma x sigmoid(v x) / √(var_group + eps) + beta over ``groups`` groups of a sample's channels."""

    groups: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(x.shape[0], self.groups, -1)
        scale = (rows.var(2, correction=0, keepdim=True) + self.eps).rsqrt()
        y = (rows * scale).reshape(x.shape)
        return self.scaled(y * torch.sigmoid(self.along(self.gate, x) * x))


@dataclass(frozen=True)
class EvoNormPass(Replacing):
    """Replace BatchNorm and activation with EvoNorm: y = gamma x / max(√(var_b + eps), v x + √(var_i + eps)) + beta.

    This is B0: var_b is the variance of a channel over the batch, by momentum in evaluation, var_i that of one sample's
    channel, v a trained vector that starts at 1. `form=s0` needs no batch: y = gamma x sigmoid(v x) / √(var_g + eps) + beta,
    var_g the variance of a sample's group of channels. gamma, beta, eps, momentum and running variance are the BatchNorm's;
    the running variance is of biased variances from here on. The activation becomes an identity.

    Left alone, with the reason: norms that something else than one activation reads, values without positions, norms
    called more than once or without running statistics by a momentum.

    Source: Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020 (arXiv 2004.02967), table 3.
    """

    name = "evonorm"
    inserts = (EvoNormB0, EvoNormS0)
    absence = "no layer of it is a BatchNorm with running statistics"
    form: Literal["b0", "s0"] = option("b0", "b0: variance of the batch and of the instance; s0: of groups of channels")
    groups: int = option(32, "groups of channels of s0, at most", at_least=1)

    def places(self, program: Program) -> Sequence[Site]:
        return sites(program, _BatchNorm)

    def obstacle(self, place: Site, program: Program) -> str:
        value, users = tensor_value(place.node), list(place.node.users)
        if sum(node.target == place.path for node, _ in program.layers()) > 1:
            return "it is called more than once"
        if len(users) != 1 or not is_activation(program, users[0]):
            return "something else reads it than one activation"
        if value is None or value.dim() < 3:
            return "its input has no positions to take statistics of"
        return "" if place.layer.running_var is not None and place.layer.momentum else "it has no running statistics"

    def layer_for(self, place: Site) -> EvoNorm:
        channels, value = int(place.layer.num_features), tensor_value(place.node)
        of = place.layer.running_var
        gate = nn.Parameter(torch.ones(channels, device=of.device, dtype=value.dtype if value is not None else None))
        bare = {"running_mean": None, "num_batches_tracked": None}
        if self.form == "b0":
            return like(place.layer, EvoNormB0, gate=gate, **bare)
        groups = math.gcd(channels, self.groups)
        return like(place.layer, EvoNormS0, gate=gate, groups=groups, running_var=None, **bare)

    def replace(self, place: Site, layer: nn.Module, context: Context) -> None:
        (activation,) = place.node.users
        context.edit.replace_layer(place.path, layer)
        context.edit.replace_layer(str(activation.target), nn.Identity(), [activation])

    def formula(self, part: Part, *inputs: torch.Tensor) -> Any:
        """Of norm and identity together where the activation was in place: the value of both."""
        if len(part.new) != 2:
            return super().formula(part, *inputs)
        y = self.reference(None, next(iter(part.new.values())), *inputs)
        return y, y

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Both forms on rows of positions, and the identity in the activation's place."""
        if isinstance(new, nn.Identity):
            return inputs[0]
        assert isinstance(new, EvoNorm)
        y = _b0(new, inputs[0].flatten(2)) if isinstance(new, EvoNormB0) else _s0(new, inputs[0].flatten(2))
        if new.weight is not None and new.bias is not None:
            y = y * new.weight[:, None] + new.bias[:, None]
        return y.reshape(inputs[0].shape)


def _b0(norm: EvoNormB0, x: torch.Tensor) -> torch.Tensor:
    over = norm.running_var
    if norm.training:
        over = (x - x.mean((0, 2), keepdim=True)).square().mean((0, 2))
        norm.running_var.copy_((1 - norm.momentum) * norm.running_var + norm.momentum * over.detach())
    own = ((x - x.mean(2, keepdim=True)).square().mean(2, keepdim=True) + norm.eps) ** 0.5
    batch = ((over + norm.eps) ** 0.5)[:, None].expand_as(x)
    gated = norm.gate[:, None] * x + own
    return x / torch.where(batch > gated, batch, gated)


def _s0(norm: EvoNorm, x: torch.Tensor) -> torch.Tensor:
    assert isinstance(norm, EvoNormS0)
    groups = x.reshape(x.shape[0], norm.groups, -1, x.shape[2])
    away = groups - groups.mean((2, 3), keepdim=True)
    deviation = (away.square().mean((2, 3), keepdim=True) + norm.eps) ** 0.5
    swish = x / (1 + torch.exp(-norm.gate[:, None] * x))
    return swish / deviation.expand_as(groups).reshape(x.shape)
