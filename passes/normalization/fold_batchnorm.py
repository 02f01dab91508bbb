"""Folding batch normalization into the convolution or linear layer beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.analysis.linears import pads
from rewrite.analysis.sites import Site, sites
from rewrite.analysis.uses import Uses
from rewrite.analysis.writers import along, named
from rewrite.graph.nodes import aten, packet
from rewrite.pipeline.folding import fold_statistics
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract
from rewrite.torch_private import _BatchNorm

if TYPE_CHECKING:
    from rewrite.graph.edit import Editor
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

_MOVES = (aten.reshape, aten.flatten, aten.transpose, aten.permute, aten.contiguous, aten.clone)


class Place(NamedTuple):
    """The layer that takes the norm, whether it stands behind it, and the nodes between."""

    node: Node
    behind: bool


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNorm into the layer before it: W = diag(s) W, b = s (b - mean) + beta with s = gamma / √(var + eps).

    In evaluation BatchNorm is one multiplication and one addition a channel, by its running statistics: the convolution or
    linear layer before it takes them, or one that reads it and nothing else does, where no padding stands between:
    W = W diag(s), b = b + W (beta - s mean). The norm is gone, parameters and buffers too. Evaluation stays the same, with
    the gradients of all old parameters; training no longer takes statistics of the batch, and is another.

    A norm is left alone, with the reason, where no such layer stands beside it alone, where that one is called elsewhere or
    shares its weight, and where the norm has no running statistics.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015 (arXiv 1502.03167), section 3.1, inference.
    """

    name = "fold-batchnorm"
    absence = "no layer of it is a BatchNorm with running statistics"
    where: Selector = option(Selector("*"), "norms to fold: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME, evaluation_only=True)

    def run(self, program: Program, context: Context) -> None:
        uses = Uses(program)
        chosen = context.choose(sites(program, _BatchNorm), self.where)
        fold_statistics(chosen, lambda site: _fold(site, _place(site, uses), context.edit), context)


def _place(site: Site, uses: Uses) -> Place | str:
    """Where a norm goes, or why it stays."""
    if site.layer.running_mean is None:
        return "it has no running statistics"
    if len(uses.calls(site.path)) > 1:
        return "it is called more than once"
    before = site.node.all_input_nodes[0]
    while packet(before) in _MOVES and len(before.users) == 1:
        before = before.all_input_nodes[0]
    reason = _obstacle(before, uses, "writes")
    if not reason and len(before.users) > 1:
        reason = f"{named(before)} is read elsewhere too"
    if not reason:
        return Place(before, behind=False)
    readers = list(site.node.users)
    if len(readers) == 1 and not _obstacle(readers[0], uses, "reads") and _reads_alike(uses.layer(readers[0])):
        return Place(readers[0], behind=True)
    return reason


def _obstacle(node: Node, uses: Uses, does: str) -> str:
    """Why a node's layer cannot take a norm in its weights; empty if it can."""
    layer: Any = uses.layer(node)
    if layer is None or not along(layer) or isinstance(layer, nn.Embedding):
        return f"{named(node)} {does} it, which is no convolution or linear layer"
    if len(uses.calls(str(node.target))) > 1:
        return f"{node.target}, which {does} it, is called elsewhere too"
    return "" if uses.alone(layer.weight) else f"{node.target}, which {does} it, shares its weight"


def _reads_alike(layer: Any) -> bool:
    """Whether a layer reads nothing but what it is given, and each output all channels of it."""
    return getattr(layer, "groups", 1) == 1 and not pads(layer)


def _fold(site: Site, place: Place | str, edit: Editor) -> str:
    """Fold a norm, or say why it stays."""
    if isinstance(place, str):
        return place
    path, norm = str(place.node.target), site.path
    affine = [f"{norm}.{name}" for name in ("weight", "bias") if getattr(site.layer, name) is not None]
    sources = [f"{norm}.running_mean", f"{norm}.running_var", *affine]
    layer: Any = edit.program.layer(place.node)
    fold = _Fold(site.layer.eps, place.behind, dict(along(layer))["weight"], layer.bias is not None)
    bias = [f"{path}.bias"] if layer.bias is not None else []
    edit.set_parameter(f"{path}.bias", fold.bias, f"{path}.weight", *sources, *bias)  # of the weight that is not folded yet
    edit.set_parameter(f"{path}.weight", fold.weight, f"{path}.weight", *sources)
    return ""


@dataclass(frozen=True)
class _Fold:
    """The weight and bias of a layer with a norm folded in, from the layer's and the norm's tensors."""

    eps: float
    behind: bool
    axis: int
    biased: bool

    def weight(self, weight: Tensor, mean: Tensor, variance: Tensor, *affine: Tensor) -> Tensor:
        """diag(s) W, or W diag(s) behind the norm."""
        shape = [1] * weight.dim()
        shape[1 - self.axis if self.behind else self.axis] = -1
        return weight * self._scale(variance, affine).reshape(shape)

    def bias(self, weight: Tensor, mean: Tensor, variance: Tensor, *others: Tensor) -> Tensor:
        """s (b - mean) + beta, or b + W (beta - s mean) behind the norm."""
        affine = others[:-1] if self.biased else others
        old = others[-1] if self.biased else torch.zeros((), dtype=weight.dtype, device=weight.device)
        scale = self._scale(variance, affine)
        shift = affine[1] if affine else torch.zeros_like(mean)
        if not self.behind:
            return scale * (old - mean) + shift
        products: Tensor = torch.tensordot(weight, shift - scale * mean, dims=([1 - self.axis], [0]))
        moved: Tensor = old + products.reshape(weight.shape[self.axis], -1).sum(1)
        return moved

    def _scale(self, variance: Tensor, affine: tuple[Tensor, ...]) -> Tensor:
        scale = (variance + self.eps).rsqrt()
        return scale * affine[0] if affine else scale
