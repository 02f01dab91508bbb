"""The scale of an RMSNorm behind the linear layers that read it (FlashNorm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.analysis.linears import Linear
from rewrite.analysis.norms import Norm, norms
from rewrite.errors import RewriteError
from rewrite.graph.like import like
from rewrite.pipeline.folding import NormReaders
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class NormedLinear(nn.Module):
    """y = (x Wᵀ) / √(mean x² + norm_eps) + bias; W is ``weight`` [out, in], or its transpose where ``transposed``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    norm_eps: float
    transposed: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        y = (x @ (self.weight if self.transposed else self.weight.t())) * scale
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class DeferNorm(Pass):
    """Scale behind the linear layers that read an RMSNorm instead of before them: W (x / r) + c = (W x) / r + c.

    r = √(mean x² + eps), which need not be known when the product begins. The norm's weight has to be folded
    (`fold-affine` before this pass), and its place is left to an identity. Function and gradients of all parameters are the
    same. In float16 it is refused: W x overflows before it is scaled.

    Left alone, with the reason: LayerNorms (`rmsnorm` before this pass), norms with weight or bias, without an eps of their
    own, called more than once, or that something else reads than linear layers of their own.

    Source: Graef, "FlashNorm: fast normalization for LLMs" (arXiv 2407.09577), section 2.
    """

    name = "defer-norm"
    inserts = (NormedLinear,)
    absence = "no layer of it is a LayerNorm or RMSNorm"
    where: Selector = option(Selector("*"), "norms to defer: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        found, ready = NormReaders(program, averages=False, convolutions=False), []
        for norm in context.choose(norms(program), self.where):
            reason = _obstacle(norm, found)
            if reason:
                context.skip(norm.path, reason)
            else:
                ready.append(norm)
        half = next((norm.path for norm in ready if norm.value.dtype is torch.float16), None)
        if half is not None:
            raise RewriteError(f"defer-norm: in float16 what reads {half} overflows before it is scaled: use bfloat16")
        for norm in ready:
            context.edit.move([norm.node], "what reads it scales instead")
            for linear in found.linears(norm.node):
                context.edit.replace_layer(linear.path, _normed(linear, norm))
            context.edit.replace_layer(norm.path, nn.Identity())


def _obstacle(norm: Norm, found: NormReaders) -> str:
    """Why a norm stays where it is; empty if nothing stands in the way."""
    if norm.kind == "layer":
        return "a LayerNorm takes a mean out: rmsnorm before this pass"
    if norm.weight is not None or norm.bias is not None:
        return "it has a weight of its own: fold-affine before this pass"
    if norm.channel_axis != -1 or len(norm.shape) != 1 or norm.eps is None:
        return "it has no eps of its own" if norm.eps is None else "its channels are not the last axis alone"
    if len(found.uses.calls(norm.path)) > 1:
        return "it is called more than once"
    linears = found.linears(norm.node)
    free = next((linear.path for linear in linears if linear.layer is None), None)
    return f"{free} reads it by parameters of its own, no layer" if free else found.obstacle(norm.node, shifted=False)


def _normed(linear: Linear, norm: Norm) -> NormedLinear:
    assert linear.layer is not None
    return like(linear.layer, NormedLinear, norm_eps=norm.eps, transposed=linear.layout == "in_out")
