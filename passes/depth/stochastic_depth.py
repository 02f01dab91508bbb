"""Residual branches that are left out at random, sample by sample, in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.branches import Branch
from rewrite.graph.nodes import tensor_value
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.placing import Placing, Surroundings, into_sum
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.pipeline.context import Context


class StochasticDepth(nn.Dropout):
    """y = m x / (1 - p) in training, m one draw a sample: 0 with probability p, else 1. x is [samples, ...]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return nn.functional.dropout(input, self.p, False)
        if self.p == 1:
            return torch.zeros_like(input)
        shape = (input.shape[0], *[1] * (input.dim() - 1))
        kept = torch.empty(shape, dtype=input.dtype, device=input.device).bernoulli_(1 - self.p)
        return input * kept.div_(1 - self.p)


@dataclass(frozen=True)
class StochasticDepthPass(Placing):
    """Leave each branch out at random in training: x + m F(x) / (1 - p), m = 0 with probability p for each sample, else 1.

    ``decay=linear``: p = rate · l / L for a branch of layer l = 1 ... L, ``uniform``: p = rate everywhere. The expectation
    is that of the model as it is, and evaluation stays the same.

    Left alone, with the reason: branches that are left out at random already, and values whose samples are not along the
    first axis.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016 (arXiv 1603.09382), section 3; divided by 1 - p in
    training instead of multiplied in evaluation.
    """

    name = "stochastic-depth"
    absence = "nothing is added to a residual stream"
    inserts = (StochasticDepth,)
    rate: float = option(0.1, "how often the branches of the last layer are left out", at_least=0, below=1)
    decay: Literal["linear", "uniform"] = option("linear", "linear: the first layers less often; uniform: all the same")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME, evaluation_only=True)

    def obstacle(self, branch: Branch, around: Surroundings) -> str:
        if any(leaves_out(node, around) for node in branch.carriers):
            return "it is left out at random already"
        return "" if samples_first(branch.writer, around) else "its samples are not along the first axis"

    def place(self, branch: Branch, around: Surroundings, context: Context) -> None:
        share = (branch.layer + 1) / around.depth if self.decay == "linear" else 1.0
        target = into_sum(branch)
        layer = StochasticDepth(self.rate * share)
        insert_behind(context.edit, branch.writer, "depth", layer, users=lambda user: user is target)


def leaves_out(node: Node, around: Surroundings) -> bool:
    """Whether a node is stochastic depth: a layer of this pass, or a switch by the mode that the model's code has."""
    layer = around.program.layer(node) if node.op == "call_module" else None
    return layer is not None and (isinstance(layer, StochasticDepth) or not isinstance(layer, nn.Dropout | nn.Identity))


def samples_first(node: Node, around: Surroundings) -> bool:
    """Whether a value's first axis is that of the model's inputs."""
    value = tensor_value(node)
    inputs = [
        v for n in around.program.graph.nodes if n.op == "placeholder" and (v := tensor_value(n)) is not None and v.dim()
    ]
    return value is not None and any(str(value.shape[0]) == str(given.shape[0]) for given in inputs)
