"""Tokens, chosen at random, that skip layers in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.branches import Branch
from rewrite.graph.layers import ScaledDotProductAttention
from rewrite.graph.like import like
from rewrite.graph.nodes import tensor_value
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.skipping import MIDDLE, Skipping
from rewrite.torch_private import _DropoutNd

if TYPE_CHECKING:
    from rewrite.analysis.blocks import Block
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class TokensKept(_DropoutNd):
    """Which tokens of x [samples, tokens, channels] do not skip: bool [samples, tokens]; all in evaluation.

    In training round(p · tokens) of each sample skip, chosen at random.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, tokens = x.shape[0], x.shape[1]
        if not self.training:
            return torch.ones(samples, tokens, dtype=torch.bool, device=x.device)
        rank = torch.rand(samples, tokens, device=x.device).argsort(1).argsort(1)
        return rank >= (torch.tensor(self.p, dtype=torch.float64) * tokens).round().to(rank.device)


class TokensSkipping(nn.Module):
    """``end`` for tokens that were kept, ``start`` for those that skipped; ``end`` in evaluation."""

    def forward(self, end: torch.Tensor, start: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return torch.where(kept[..., None], end, start) if self.training else nn.functional.dropout(end, 0.0, False)


class KeptAttention(ScaledDotProductAttention):
    """Attention whose keys in training are the tokens kept, and each query's own (whose result is not used then)."""

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kept: torch.Tensor
    ) -> torch.Tensor:
        causal = self.is_causal
        if self.training:
            tokens = key.shape[-2]
            seen = kept[:, None, None, :] | torch.eye(tokens, dtype=torch.bool, device=key.device)
            seen = seen.tril() if causal else seen
            causal = False
            if mask is not None and mask.dtype is torch.bool:
                mask = mask & seen
            else:
                base = torch.zeros((), dtype=query.dtype, device=query.device) if mask is None else mask
                mask = base.masked_fill(~seen, torch.finfo(query.dtype).min)
        p = self.dropout_p if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, p, causal, scale=self.scale, enable_gqa=self.enable_gqa
        )


@dataclass(frozen=True)
class RandomLTD(Skipping):
    """Let tokens, chosen at random, skip layers in training: y_t = block(x)_t for tokens kept, x_t for the others.

    Each layer draws its own: round(rate · tokens) of each sample skip it. Those kept attend to each other alone, as if the
    others were not there; positions stay what they were. Evaluation stays the same. What tokens that skip would be is
    computed all the same, since sizes of a graph do not follow a draw: it regularizes, and saves no time.

    Left alone, with the reason: blocks with norms after the additions, streams that are not [samples, tokens, channels], and
    blocks in which something but an FFN, or an attention whose softmax is one layer with its keys, mixes tokens.

    Source: Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale
    Transformers" (arXiv 2211.11586), section 3. Its schedule is the caller's: `p` of the layers may be set between steps.
    """

    name = "random-ltd"
    inserts = (TokensKept, TokensSkipping, KeptAttention)
    layers: str = option(
        MIDDLE, "numbers of the layers, as `rewrite show` counts them: '1,2' or '0-3,8'; all; middle: inner ones"
    )
    rate: float = option(0.5, "part of the tokens that skip a layer", at_least=0, below=1)

    def obstacle(self, block: Block, program: Program) -> str:
        start = tensor_value(block.start)
        if start is None or start.dim() != 3 or not all(map(_channels_last, block.branches)):
            return "its stream is not [samples, tokens, channels]"
        return next(filter(None, (_mixing(branch, program) for branch in block.branches)), "")

    def place(self, block: Block, program: Program, context: Context) -> None:
        edit = context.edit
        kept = insert_behind(edit, block.start, "kept", TokensKept(self.rate), users=lambda user: False)
        for branch in block.branches:
            for node in _attentions(branch, program):
                layer = like(program.layer(node), KeptAttention)
                mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
                made = edit.insert_layer(f"{node.target}_kept", layer, [*node.args[:3], mask, kept], after=node)
                edit.rewire(node, made)
                edit.remove(node)
        insert_behind(edit, block.end, "skipping", TokensSkipping(), also=[block.start, kept])


def _channels_last(branch: Branch) -> bool:
    """Whether what a branch adds is [samples, tokens, channels]; of an FFN, which mixes no tokens, they may be one axis."""
    value, axis = tensor_value(branch.writer), branch.stream.values.get(branch.writer)
    sizes = (2, 3) if branch.kind in ("ffn", "gated ffn") else (3,)
    return value is not None and value.dim() in sizes and axis == value.dim() - 1


def _attentions(branch: Branch, program: Program) -> Iterator[Node]:
    for node in branch.nodes:
        if node.op == "call_module" and isinstance(program.layer(node), ScaledDotProductAttention):
            yield node


def _mixing(branch: Branch, program: Program) -> str:
    """What in a branch mixes tokens in a way that cannot be confined to those kept."""
    if branch.kind in ("ffn", "gated ffn"):
        return ""
    found = list(_attentions(branch, program))
    start = tensor_value(branch.other)
    if branch.kind != "attention" or len(found) != 1 or start is None:
        return f"{branch.path} mixes tokens, and is no attention whose softmax is one layer"
    if isinstance(program.layer(found[0]), KeptAttention):
        return "tokens skip it already"
    key = tensor_value(found[0].args[1])
    fits = key is not None and key.dim() == 4 and str(key.shape[-2]) == str(start.shape[1])
    return "" if fits else f"the keys of {branch.path} are not the tokens of the stream"
