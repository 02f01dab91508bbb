"""Folding a norm's weight and bias into the linear layers and convolutions that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewrite.analysis.norms import norms
from rewrite.graph.layers import BiasedRMSNorm, ChannelsLayerNorm
from rewrite.pipeline.folding import NormReaders, affine_obstacle, fold_affine, without_affine
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold a norm's weight and bias into what reads it: W (g n + b) + c = (W diag(g)) n + (c + W b).

    The norm n stays, without weight and bias of its own; the function and the gradients of all old parameters are the same.
    Linear layers are all that compute one: GPT-2's Conv1D, with W kept transposed, packed projections and concatenated
    biases, too; and convolutions without groups behind a norm of their channels, with W b summed over the kernel. A norm is
    left alone, with the reason, where something else reads it, where a reader is called elsewhere too or shares its weight,
    and where the norm has a bias and a reader has none to take it or puts zeros around its input.

    Source: Graef, "FlashNorm: fast normalization for LLMs" (arXiv 2407.09577), which folds the weight; the bias likewise.
    """

    name = "fold-affine"
    inserts = (ChannelsLayerNorm, BiasedRMSNorm)
    absence = "no layer of it is a LayerNorm or RMSNorm with a weight or a bias"
    where: Selector = option(Selector("*"), "norms to fold: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        found = NormReaders(program)
        affine = [norm for norm in norms(program) if norm.weight is not None or norm.bias is not None]
        for norm in context.choose(affine, self.where):
            reason = affine_obstacle(norm, found)
            if reason:
                context.skip(norm.path, reason)
            else:
                fold_affine(context.edit, norm, found.linears(norm.node, norm.channel_axis))
                context.edit.replace_layer(norm.path, without_affine(norm))
