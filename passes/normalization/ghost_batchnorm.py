"""Batch normalization over parts of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.analysis.sites import Site, sites
from rewrite.graph.like import like
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.replacing import Replacing
from rewrite.torch_private import _BatchNorm

if TYPE_CHECKING:
    from rewrite.graph.program import Program


class GhostBatchNorm(_BatchNorm):
    """BatchNorm whose statistics in training are of each part of ``size`` samples, or somewhat more, by itself.

    x is [N, C] or [N, C, ...]. The running statistics take in one part after the other. In evaluation it is BatchNorm.
    """

    size: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self._part(x)
        return torch.cat([self._part(part) for part in x.tensor_split(parts(x, self.size))])

    def _part(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, variance = self.running_mean, self.running_var
        training = self.training or mean is None
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training, self.momentum or 0.0, self.eps)


def parts(x: torch.Tensor, size: int) -> int:
    """Into how many parts of at least ``size`` samples a batch falls; one if it is smaller."""
    return max(1, x.shape[0] // size)


@dataclass(frozen=True)
class GhostBatchNormPass(Replacing):
    """Train BatchNorm with the statistics of parts of the batch: y = gamma (x - mean_p) / √(var_p + eps) + beta.

    p is the part of `size` samples that x is in; what is left over is spread over the parts. Running statistics take in
    part after part. Evaluation stays the same; training is another, with the noise of small batches at any batch size.

    Left alone, with the reason: norms whose running statistics are a cumulative average (momentum None).

    Source: Hoffer et al., "Train longer, generalize better", NeurIPS 2017 (arXiv 1705.08741), algorithm 1.
    """

    name = "ghost-batchnorm"
    inserts = (GhostBatchNorm,)
    absence = "no layer of it is a plain BatchNorm with running statistics"
    size: int = option(32, "samples of a part", at_least=1)

    def places(self, program: Program) -> Sequence[Site]:
        return [site for site in sites(program, _BatchNorm) if type(site.layer) is not GhostBatchNorm]

    def obstacle(self, place: Site, program: Program) -> str:
        cumulative = place.layer.momentum is None and place.layer.running_mean is not None
        return "its running statistics are a cumulative average" if cumulative else ""

    def layer_for(self, place: Site) -> GhostBatchNorm:
        return like(place.layer, GhostBatchNorm, size=self.size)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Part by part; running statistics move by momentum towards mean and unbiased variance of each."""
        assert isinstance(new, GhostBatchNorm)
        if not new.training:
            return _normalized(inputs[0], new)
        count = parts(inputs[0], new.size)
        least, more = divmod(inputs[0].shape[0], count)
        found = inputs[0].split([least + (i < more) for i in range(count)])
        return torch.cat([_normalized(part, new) for part in found])


def _normalized(x: torch.Tensor, norm: GhostBatchNorm) -> torch.Tensor:
    channels = x.transpose(0, 1).flatten(1)
    mean, variance, momentum = channels.mean(1), channels.var(1, correction=0), norm.momentum or 0.0
    if norm.running_mean is not None and norm.running_var is not None:
        if norm.training:
            spread = variance.detach() * (channels.shape[1] / max(channels.shape[1] - 1, 1))
            norm.running_mean.copy_((1 - momentum) * norm.running_mean + momentum * mean.detach())
            norm.running_var.copy_((1 - momentum) * norm.running_var + momentum * spread)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        else:
            mean, variance = norm.running_mean, norm.running_var
    y = (channels - mean[:, None]) / (variance[:, None] + norm.eps).sqrt()
    y = y if norm.weight is None else y * norm.weight[:, None] + norm.bias[:, None]
    return y.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
