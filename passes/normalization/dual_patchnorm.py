"""Norms before and behind the patch embedding (Dual PatchNorm)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.analysis.sites import Site, sites
from rewrite.axes.layers import keeps_size
from rewrite.graph.like import like
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.replacing import Replacing

if TYPE_CHECKING:
    from rewrite.graph.program import Program


class NormedPatches(nn.Conv2d):
    """A convolution over patches that do not overlap, each normalized before it, and what it gives normalized behind it.

    ``weight`` and ``bias`` are the convolution's; ``patch_weight`` and ``patch_bias`` [C p q] scale the pixels of a
    patch, in the order channel, row, column, ``channel_weight`` and ``channel_bias`` [D] the channels behind it.
    """

    patch_weight: nn.Parameter
    patch_bias: nn.Parameter
    channel_weight: nn.Parameter
    channel_bias: nn.Parameter
    norm_eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high, wide = (int(size) for size in self.kernel_size)
        rows, columns = x.shape[2] // high, x.shape[3] // wide
        x = x[:, :, : rows * high, : columns * wide]
        tiles = x.reshape(x.shape[0], x.shape[1], rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5).flatten(3)
        tiles = F.layer_norm(tiles, tiles.shape[-1:], self.patch_weight, self.patch_bias, self.norm_eps)
        y = F.linear(tiles, self.weight.flatten(1), self.bias)
        y = F.layer_norm(y, y.shape[-1:], self.channel_weight, self.channel_bias, self.norm_eps)
        return y.permute(0, 3, 1, 2)


keeps_size(0, "what it gives is normalized within", NormedPatches)


@dataclass(frozen=True)
class DualPatchNorm(Replacing):
    """Normalize the patches of an image before and behind their embedding: N_2(W N_1(patch) + b).

    N_1 is a LayerNorm over all pixels of a patch, N_2 one over the channels of the embedding, both with weight 1 and bias 0
    at the start. It replaces the convolution that reads the image, if its patches do not overlap (stride = kernel size, no
    padding). Another function, to be trained.

    Left alone, with the reason: convolutions that read an input of the model and have overlapping patches, groups or
    padding. Others are no patch embedding.

    Source: Kumar et al., "Dual PatchNorm", TMLR 2023 (arXiv 2302.01327), section 3.
    """

    name = "dual-patchnorm"
    inserts = (NormedPatches,)
    absence = "no convolution reads an input of it"
    eps: float = option(1e-6, "eps of both norms", above=0, finite=True)

    def places(self, program: Program) -> Sequence[Site]:
        return [site for site in sites(program, nn.Conv2d) if site.node.all_input_nodes[0].op == "placeholder"]

    def obstacle(self, place: Site, program: Program) -> str:
        conv = place.layer
        if type(conv) is not nn.Conv2d:
            return f"it is a {type(conv).__name__}, no plain convolution"
        plain = conv.groups == 1 and conv.padding in ((0, 0), "valid") and tuple(conv.dilation) == (1, 1)
        if not plain or tuple(conv.stride) != tuple(conv.kernel_size):
            return "its patches overlap, are padded or fall into groups"
        return ""

    def layer_for(self, place: Site) -> NormedPatches:
        weight: nn.Parameter = place.layer.weight
        own: dict[str, nn.Parameter] = {}
        for name, size in (("patch", weight[0].numel()), ("channel", weight.shape[0])):
            ones = torch.ones(size, dtype=weight.dtype, device=weight.device)
            own |= {f"{name}_weight": nn.Parameter(ones), f"{name}_bias": nn.Parameter(torch.zeros_like(ones))}
        return like(place.layer, NormedPatches, norm_eps=self.eps, **own)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Patches as columns, by unfold."""
        assert isinstance(new, NormedPatches)
        high, wide = (int(size) for size in new.kernel_size)
        x = inputs[0]
        columns = F.unfold(x, (high, wide), stride=(high, wide))
        normed = _standardized(columns, new.norm_eps) * new.patch_weight[:, None] + new.patch_bias[:, None]
        y = new.weight.flatten(1) @ normed
        y = y if new.bias is None else y + new.bias[:, None]
        y = _standardized(y, new.norm_eps) * new.channel_weight[:, None] + new.channel_bias[:, None]
        return y.reshape(x.shape[0], -1, x.shape[2] // high, x.shape[3] // wide)


def _standardized(columns: torch.Tensor, eps: float) -> torch.Tensor:
    away = columns - columns.mean(1, keepdim=True)
    return away / (away.square().mean(1, keepdim=True) + eps).sqrt()
