"""Normalization over channels behind batch normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewrite.analysis.sites import Site, sites
from rewrite.analysis.uses import Uses
from rewrite.graph.nodes import tensor_value
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, Contract
from rewrite.torch_private import _BatchNorm

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context
    from rewrite.proof.part import Part


@dataclass(frozen=True)
class BatchChannelNorm(Pass):
    """Normalize over groups of channels what BatchNorm gives: y = gamma_c (z - mean_g) / √(var_g + eps) + beta_c, z = BN(x).

    Mean and variance are those of a sample's group of channels at all positions. gamma_c starts at 1, beta_c at 0, eps is
    the BatchNorm's. No channel is then far below the others, which BatchNorm by running statistics does not prevent where
    batches are small. A BatchNorm becomes a BatchNorm and a GroupNorm behind it; there are as many groups as divide the
    channels, `groups` at most.

    Left alone, with the reason: norms that are called more than once, and those with a GroupNorm behind them.

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization"
    (arXiv 1903.10520), section 4, for batches; not its estimates of statistics for micro-batches.
    """

    name = "batch-channel-norm"
    absence = "no layer of it is a BatchNorm with running statistics"
    groups: int = option(32, "groups of channels, at most", at_least=1)
    where: Selector = option(Selector("*"), "norms to put another behind: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        uses = Uses(program)
        for site in context.choose(sites(program, _BatchNorm), self.where):
            reason = _obstacle(site, uses)
            if reason:
                context.skip(site.path, reason)
            else:
                insert_behind(context.edit, site.node, "channels", self._layer(site))

    def _layer(self, site: Site) -> nn.GroupNorm:
        value, channels = tensor_value(site.node), int(site.layer.num_features)
        assert value is not None
        like = value if site.layer.weight is None else site.layer.weight
        groups = math.gcd(channels, self.groups)
        return nn.GroupNorm(groups, channels, site.layer.eps, device=like.device, dtype=like.dtype)

    def formula(self, part: Part, *inputs: torch.Tensor) -> Any:
        """Behind the BatchNorm itself where that is in the part: an activation writes into its value in place."""
        if len(part.new) != 2:
            return super().formula(part, *inputs)
        norm, behind = part.new.values()
        return self.reference(None, behind, norm(inputs[0]))

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Each sample's groups of channels as rows."""
        assert isinstance(new, nn.GroupNorm)
        x = inputs[0]
        rows = x.reshape(x.shape[0] * new.num_groups, -1)
        away = rows - rows.mean(1, keepdim=True)
        y = (away / (away.square().mean(1, keepdim=True) + new.eps).sqrt()).reshape(x.shape[0], x.shape[1], -1)
        return (y * new.weight[:, None] + new.bias[:, None]).reshape(x.shape)


def _obstacle(site: Site, uses: Uses) -> str:
    """Why no norm is put behind another; empty if nothing stands in the way."""
    if len(uses.calls(site.path)) > 1:
        return "it is called more than once"
    return "a GroupNorm is behind it" if any(isinstance(uses.layer(n), nn.GroupNorm) for n in site.node.users) else ""
