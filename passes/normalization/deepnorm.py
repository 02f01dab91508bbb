"""The skip of post-norm blocks scaled up (DeepNorm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rewrite.graph.layers import BiasedRMSNorm, Scale
from rewrite.graph.like import like
from rewrite.graph.relation import Scaled
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.placing import Placing, Surroundings, times
from rewrite.proof.contract import NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.analysis.branches import Branch
    from rewrite.pipeline.context import Context

_NORMS = (nn.LayerNorm, nn.RMSNorm, BiasedRMSNorm)


@dataclass(frozen=True)
class DeepNorm(Placing):
    """Scale the skip of each post-norm block up: N(x + F(x)) becomes N(alpha x + F(x)).

    alpha is (2 L)^(1/4) for a model of L layers, or what `alpha` says. ``mode=exact`` keeps the function of a trained
    model: the projection at the end of F is multiplied by alpha and the eps of the norm by its square, so that the norm
    takes alpha out again. ``mode=new`` leaves them, for training from the start (the paper then also scales the weights at
    the start by (8 L)^(-1/4), which is the initialization's to do).

    Left alone, with the reason: branches that are not post-norm, norms that are spelled out in operators or read elsewhere
    and, with ``mode=exact``, branches that do not end in a projection of their own.

    Source: Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", TPAMI 2024 (arXiv 2203.00555), table 1: the
    constants of a decoder or encoder alone.
    """

    name = "deepnorm"
    inserts = (Scale, BiasedRMSNorm)
    mode: Literal["exact", "new"] = option("exact", "exact: branch and eps take alpha too; new: the plain scale")
    alpha: float | None = option(None, "factor of the skip; (2 L)^(1/4) where none is given", above=0, finite=True)

    def contract(self) -> Contract:
        promise = SAME if self.mode == "exact" else NEW
        return Contract(forward=promise, backward=promise)

    def obstacle(self, branch: Branch, around: Surroundings) -> str:
        if branch.order != "post":
            return f"its norm does not stand behind the sum: it is {branch.order}-norm"
        if isinstance(around.writers.uses.layer(branch.other), Scale):
            return "its skip is scaled already"
        if around.writes.into(branch.addition):
            return "the sum is written in place"
        if self.mode == "new":
            return ""
        for node in branch.stream_norms:
            layer = around.writers.uses.layer(node)
            if type(layer) not in _NORMS or getattr(layer, "eps", None) is None:
                return f"the norm behind it, {node.target}, has no eps that can be set"
            if len(around.writers.uses.calls(str(node.target))) > 1:
                return f"the norm behind it, {node.target}, is called more than once"
        found = around.tensors(branch)
        return found if isinstance(found, str) else ""

    def place(self, branch: Branch, around: Surroundings, context: Context) -> None:
        alpha = (2 * around.depth) ** 0.25 if self.alpha is None else self.alpha
        edit = context.edit
        if self.mode == "exact":
            edit.move(
                [n for n in branch.stream.values if n is not branch.other],
                "the norm behind them takes alpha out",
                Scaled(alpha),
            )
            for path in around.tensors(branch):
                edit.set_parameter(path, times(alpha), path)
            for node in branch.stream_norms:
                norm: Any = around.writers.uses.layer(node)
                edit.replace_layer(str(node.target), like(norm, type(norm), eps=norm.eps * alpha**2))
        insert_behind(edit, branch.other, "alpha", Scale(alpha), users=lambda user: user is branch.addition)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """alpha x."""
        assert isinstance(new, Scale)
        return new.factor * inputs[0]
