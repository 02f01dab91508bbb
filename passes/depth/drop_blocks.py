"""Whole blocks dropped."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.analysis.influence import BlockInfluence
from rewrite.pipeline.dropping import Dropping


@dataclass(frozen=True)
class DropBlocks(Dropping):
    """Drop every branch of chosen layers: x + Attn(N x) + FFN(N' x) becomes x.

    Branches of every kind go, convolutional ones and cross-attention too, with their norms, scales and parameters. The
    error of each sum is measured and held against ``bound``.

    Refused: a branch whose values are read elsewhere.

    Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
    ICML 2024 (arXiv 2402.09025).
    """

    name = "drop-blocks"
    absence = "nothing is added to a residual stream"
    kinds = ("attention", "cross-attention", "ffn", "gated ffn", "experts", "convolutional", "other")

    def weighs(self, block: BlockInfluence) -> float:
        """The block's influence."""
        return block.influence
