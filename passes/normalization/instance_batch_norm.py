"""Instance and batch normalization side by side (IBN)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.analysis.sites import Site, sites
from rewrite.graph.like import like
from rewrite.graph.nodes import tensor_value
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.replacing import Replacing
from rewrite.torch_private import _BatchNorm

if TYPE_CHECKING:
    from rewrite.graph.program import Program


class InstanceBatchNorm(nn.Module):
    """The first ``split`` channels of [N, C, ...] normalized by each sample's own statistics, the others as BatchNorm does.

    ``weight``, ``bias`` and the running statistics are the BatchNorm's; those of the first channels stand still.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    split: int
    momentum: float
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, rest = x[:, : self.split], x[:, self.split :]
        variance, mean = torch.var_mean(own, tuple(range(2, x.dim())), correction=0, keepdim=True)
        own = (own - mean) * (variance + self.eps).rsqrt()
        if self.training:
            self.num_batches_tracked.add_(1)
        running = self.running_mean[self.split :], self.running_var[self.split :]
        rest = F.batch_norm(rest, *running, None, None, self.training, self.momentum, self.eps)
        y = torch.cat([own, rest], 1)
        if self.weight is None or self.bias is None:
            return y
        shape = (-1, *[1] * (x.dim() - 2))
        return y * self.weight.reshape(shape) + self.bias.reshape(shape)


@dataclass(frozen=True)
class InstanceBatchNormPass(Replacing):
    """Normalize a part of BatchNorm's channels by instance: y = gamma (x - mean_nc) / √(var_nc + eps) + beta.

    The first `share` of the channels take mean and variance over the positions of one sample and channel, in training and
    evaluation; the others stay as BatchNorm has them, with the trained weight, bias and running statistics. The paper's
    IBN-a does so with the first norm of each residual block: `where=*.bn1`.

    Left alone, with the reason: norms of values without positions, and those without running statistics or with a
    cumulative average.

    Source: Pan et al., "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", ECCV 2018
    (arXiv 1807.09441), section 3.2.
    """

    name = "instance-batch-norm"
    inserts = (InstanceBatchNorm,)
    absence = "no layer of it is a BatchNorm with running statistics"
    share: float = option(0.5, "which part of the channels are normalized by instance", above=0, at_most=1)

    def places(self, program: Program) -> Sequence[Site]:
        return sites(program, _BatchNorm)

    def obstacle(self, place: Site, program: Program) -> str:
        value = tensor_value(place.node)
        if value is None or value.dim() < 3:
            return "its input has no positions to take statistics of"
        tracked = place.layer.running_mean is not None and place.layer.momentum is not None
        return "" if tracked else "it has no running statistics with a momentum"

    def layer_for(self, place: Site) -> InstanceBatchNorm:
        channels = int(place.layer.num_features)
        return like(place.layer, InstanceBatchNorm, split=max(1, round(self.share * channels)))

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Mean and variance of each row of positions, or of all rows of a channel, as its half says."""
        assert isinstance(new, InstanceBatchNorm)
        rows = inputs[0].flatten(2)
        by_sample = torch.arange(rows.shape[1], device=rows.device)[None, :, None] < new.split
        batch, spread = rows.mean((0, 2)), rows.var((0, 2), correction=0)
        if new.training:
            count = rows.shape[0] * rows.shape[2]
            new.num_batches_tracked.add_(1)
            for kept, now in ((new.running_mean, batch), (new.running_var, spread * count / max(count - 1, 1))):
                kept[new.split :] = torch.lerp(kept, now.detach().to(kept.dtype), new.momentum)[new.split :]
        else:
            batch, spread = new.running_mean, new.running_var
        mean = torch.where(by_sample, rows.mean(2, keepdim=True), batch[None, :, None])
        variance = torch.where(by_sample, rows.var(2, correction=0, keepdim=True), spread[None, :, None])
        y = (rows - mean) / (variance + new.eps) ** 0.5
        if new.weight is not None and new.bias is not None:
            y = y * new.weight[:, None] + new.bias[:, None]
        return y.reshape(inputs[0].shape)
