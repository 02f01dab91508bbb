"""Norms that keep for their gradient what the next layer keeps anyway: their result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.norms import Norm, norms
from rewrite.graph.spelled import SpelledNorm
from rewrite.graph.straight import Straight
from rewrite.pipeline.folding import NormReaders, affine_obstacle, fold_affine, without_affine
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract
from rewrite.training.kept import keeper
from rewrite.training.normalized import normalized

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class SharedNorm(nn.Module):
    """y = inner(x) for a norm ``inner`` without weight and bias; dx = r (dy - mean(dy) - y mean(y dy)), r = 1/√(var + eps).

    Kept for the backward are y and r, one number a row. A root mean square norm has no mean of dy. Without gradient it is
    ``inner`` and nothing else.
    """

    def __init__(self, inner: nn.Module, dims: int, eps: float | None, centered: bool) -> None:
        super().__init__()
        self.inner = inner
        self.dims, self.eps, self.centered = dims, eps, centered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            plain: torch.Tensor = self.inner(x)
            return plain
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        found: torch.Tensor = normalized(x, self.inner(x.detach()), self.dims, eps, self.centered)[0]
        return found

    def plain(self) -> nn.Module:
        """The norm, whose forward this is."""
        return self.inner


@dataclass(frozen=True)
class ShareNorm(Pass):
    """Compute a norm's gradient from its result, which the next layer keeps: dx = r (dy - mean(dy) - y mean(y dy)).

    r = 1 / √(variance + eps) is kept beside it, one number a row; of a root mean square norm the same without mean(dy). What
    the norm was given is not kept any more: one tensor a norm. A weight and a bias are folded into the linear layers that
    read the norm first. The forward is the norm's own, bit for bit where nothing had to be folded. A norm is left alone,
    with the reason, where folding is impossible, where no layer keeps its result (a dropout in between), and where another
    one keeps what it is given.

    Source: Yang et al., "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation", ICML 2024
    (arXiv 2406.16282): MS-LN and MS-RMSNorm.
    """

    name = "share-norm"
    inserts = (SharedNorm,)
    where: Selector = option(Selector("*"), "norms: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        readers = NormReaders(program)
        found = norms(program)
        spared = {norm.node for norm in found if not _obstacle(program, norm, readers, {norm.node for norm in found})}
        for norm in context.choose(found, self.where):
            reason = _obstacle(program, norm, readers, spared)
            if reason:
                context.skip(norm.path, reason)
                continue
            inner = _inner(program, norm)
            if norm.weight is not None or norm.bias is not None:
                fold_affine(context.edit, norm, readers.linears(norm.node, norm.channel_axis))
            layer = SharedNorm(inner, len(norm.shape), norm.eps, norm.kind == "layer")
            context.edit.replace_layer(norm.path, layer)


def _obstacle(program: Program, norm: Norm, readers: NormReaders, spared: set[Node]) -> str:
    """Why a norm stays as it is, empty if it need not; ``spared`` are norms that will not keep what they are given."""
    if norm.channel_axis != -1:
        return "its channels are not the last axis"
    if len(readers.uses.calls(norm.path)) > 1:
        return "it is called more than once"
    if not keeper(program, norm.node, results=False):
        return "no layer keeps its result"
    keeps = keeper(program, norm.node.all_input_nodes[0], besides={norm.node, *spared}, results=False)
    if keeps:
        return f"what it is given is kept by {keeps} anyway"
    return affine_obstacle(norm, readers) if norm.weight is not None or norm.bias is not None else ""


def _inner(program: Program, norm: Norm) -> nn.Module:
    layer = program.layer(norm.node)
    if norm.weight is not None or norm.bias is not None:
        return without_affine(norm)
    return Straight.of(layer.graphs["any"]) if isinstance(layer, SpelledNorm) else without_affine(norm)
