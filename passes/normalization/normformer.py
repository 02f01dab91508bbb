"""Norms within attention and FFN, and a gain for each head (NormFormer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import ScaledDotProductAttention
from rewrite.graph.nodes import fixed_size, tensor_value
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.norm_formulas import norm_formula
from rewrite.pipeline.outer_norms import has_last, norm_for
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.placing import Placing, Surroundings
from rewrite.proof.contract import NEW, Contract

if TYPE_CHECKING:
    from rewrite.analysis.branches import Branch
    from rewrite.pipeline.context import Context


class HeadScale(nn.Module):
    """y[..., h, t, :] = scale[h] · x[..., h, t, :]."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale[:, None, None]


@dataclass(frozen=True)
class NormFormer(Placing):
    """Normalize within pre-norm blocks: x + N'(Attn(N x)) with each head times a gain, and x + W_2 N''(act(W_1 N x)).

    The norm behind attention and that behind the activation are LayerNorms (RMSNorms where the branch begins with one) with
    weight 1 and the eps of the norm at its start; the gain of each head starts at 1, and goes behind the attention of the
    heads, where that is one operator. Another function, to be trained.

    Left alone, with the reason: branches that are neither attention nor plain FFN, do not begin with a norm or have these
    layers already.

    Source: Shleifer et al., "NormFormer: Improved Transformer Pretraining with Extra Normalization" (arXiv 2110.09456),
    section 2; the norm of the FFN behind its activation, as their code has it.
    """

    name = "normformer"
    inserts = (HeadScale,)
    heads: bool = option(True, "a gain for each head")
    attention: bool = option(True, "a norm behind attention")
    ffn: bool = option(True, "a norm behind the FFN's activation")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def obstacle(self, branch: Branch, around: Surroundings) -> str:
        if branch.kind not in ("attention", "ffn"):
            return f"it is {branch.kind}, neither attention nor a plain FFN"
        if branch.order not in ("pre", "peri"):
            return f"it is {branch.order}-norm, not pre-norm"
        if self._is_done(branch, around):
            return "it has these layers already"
        if branch.kind == "attention":
            return "" if self._of_attention(branch, around) else "there is nothing that the options ask for"
        return "" if self._of_ffn(branch) else "there is not one activation with channels along the last axis"

    def _is_done(self, branch: Branch, around: Surroundings) -> bool:
        layers = [around.writers.uses.layer(node) for node in branch.nodes]
        norms = [layer for layer in layers if isinstance(layer, nn.LayerNorm | nn.RMSNorm)]
        return any(isinstance(layer, HeadScale) for layer in layers) or len(norms) > len(branch.norms)

    def _of_attention(self, branch: Branch, around: Surroundings) -> list[Node]:
        """The attention of heads, and what the branch ends in, where layers go behind them."""
        found = [n for n in branch.nodes if isinstance(around.writers.uses.layer(n), ScaledDotProductAttention)]
        heads = [n for n in found if _heads(n) is not None] if self.heads else []
        ends = (
            [branch.output]
            if self.attention and branch.scale is None and has_last(branch.output, branch.stream.size)
            else []
        )
        return [*heads, *ends]

    def _of_ffn(self, branch: Branch) -> list[Node]:
        """The activation that a norm goes behind."""
        acts = branch.parts.activations
        return list(acts) if self.ffn and len(acts) == 1 and has_last(acts[0]) else []

    def place(self, branch: Branch, around: Surroundings, context: Context) -> None:
        nodes = self._of_attention(branch, around) if branch.kind == "attention" else self._of_ffn(branch)
        for node in nodes:
            if isinstance(around.writers.uses.layer(node), ScaledDotProductAttention):
                value = tensor_value(node)
                assert value is not None
                like = next(around.program.module.parameters(), value)
                scale = torch.ones(_heads(node) or 1, dtype=value.dtype, device=like.device)
                insert_behind(context.edit, node, "heads", HeadScale(scale))
            else:
                insert_behind(context.edit, node, "norm", norm_for(around.program, branch, node))

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The norm written out, or each head times its gain."""
        if isinstance(new, HeadScale):
            return torch.einsum("...htd,h->...htd", inputs[0], new.scale)
        return norm_formula(new, inputs[0])


def _heads(node: Node) -> int | None:
    """How many heads an attention has, where that is fixed: its output is [..., heads, tokens, size]."""
    value = tensor_value(node)
    return None if value is None or value.dim() != 4 else fixed_size(value.shape[1])
