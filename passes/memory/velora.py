"""Linear layers that keep one number for each few of their input: its length along a fixed direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewrite.analysis.observe import data_or_examples, observe
from rewrite.axes.layers import keeps_size
from rewrite.graph.layers import TransposedLinear
from rewrite.graph.like import like
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import ESTIMATE, SAME, Contract
from rewrite.training.column_linear import directed_linear
from rewrite.training.estimated import Estimated, linear_gradient
from rewrite.training.lone_linears import LinearSite, lone_linears

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context
    from rewrite.proof.part import Part


class _Directed(Estimated):
    """What both layers do: their weight's gradient comes from z = x_sub · ``direction``."""

    direction: torch.Tensor
    own = ("direction",)

    def kept(self, x: torch.Tensor) -> tuple[Any, ...]:
        return x.unflatten(-1, (-1, self.direction.numel())) @ self.direction.to(x.dtype), self.direction

    def estimated(self, *given: Any) -> torch.Tensor:
        found: torch.Tensor = directed_linear(*given)
        return found


class VeLoRALinear(_Directed, nn.Linear):
    """y = x Wᵀ + b; dW = dyᵀ x̂ with x̂ = (x_sub · v) v for each part x_sub of x as wide as v."""

    kind = nn.Linear


class VeLoRATransposedLinear(_Directed, TransposedLinear):
    """The same for y = x W + b."""

    kind = TransposedLinear


KINDS: tuple[type[nn.Module], ...] = (VeLoRALinear, VeLoRATransposedLinear)
keeps_size(1, "velora keeps its input in parts", VeLoRALinear)
keeps_size(0, "velora keeps its input in parts", VeLoRATransposedLinear)


@dataclass(frozen=True)
class VeLoRA(Pass):
    """Keep of a linear layer's input one number for each ``width`` of them: z = x_sub · v, restored as z v.

    v is the normalized mean sub-token of the data's calls (of the example inputs without), fixed from then on. The weight's
    gradient becomes dW P with P = v vᵀ in blocks: a projection, so that its error is at most dW itself, and nothing across
    v is ever learned from these layers. It is biased, a rank-one stand-in and no compressor. The gradients of input and
    bias are exact. A layer is left alone, with the reason, where ``width`` does not divide its inputs, where its weight is
    shared, and where another one keeps what it is given.

    Source: Miles et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", NeurIPS 2024
    (arXiv 2405.17991).
    """

    name = "velora"
    inserts = KINDS
    width: int = option(32, "inputs that are kept as one number", at_least=2, at_most=2**20)
    where: Selector = option(Selector("*"), "linear layers: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=ESTIMATE, bound=1.0, cosine=0.0)

    def run(self, program: Program, context: Context) -> None:
        chosen = []
        for site in context.choose(lone_linears(program, KINDS), self.where):
            reason = site.obstacle or f"{self.width} does not divide its {site.layer.in_features} inputs" * bool(
                site.layer.in_features % self.width
            )
            if reason:
                context.skip(site.path, reason)
            else:
                chosen.append(site)
        data = data_or_examples(program, context.data)
        nodes = {str(node.target): node.all_input_nodes[0] for node, _ in program.layers()}
        sources = list(dict.fromkeys(nodes[site.path] for site in chosen))
        found = observe(program, sources, data, progress=context.progress, axis=-1) if sources else {}
        for site in chosen:
            mean = found[nodes[site.path]].mean.view(-1, self.width).mean(0)
            if float(mean.norm()) == 0:
                context.skip(site.path, "the mean of what it is given is 0")
            else:
                context.edit.replace_layer(site.path, _directed(site, mean / mean.norm()))

    def gradient(self, part: Part, inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor]) -> Any:
        """That of the linear layer for x̂ in place of x, where the weight's is concerned."""
        (layer,) = part.new.values()
        made: Any = layer
        v, (x,) = made.direction.double(), inputs
        sub = x.unflatten(-1, (-1, len(v)))
        return linear_gradient(part.new, ((sub * v).sum(-1, keepdim=True) * v).flatten(-2), grad_outputs[0])


def _directed(site: LinearSite, direction: torch.Tensor) -> nn.Module:
    weight = site.layer.weight
    kind = VeLoRATransposedLinear if isinstance(site.layer, TransposedLinear) else VeLoRALinear
    return like(site.layer, kind, direction=direction.to(weight.device, weight.dtype))
