"""FFNs dropped from chosen layers."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.pipeline.dropping import Dropping


@dataclass(frozen=True)
class DropFFN(Dropping):
    """Drop the FFNs of chosen layers: x + FFN(N x) becomes x.

    The whole branch goes, plain, gated or a mixture of experts: its norm, projections, scale, dropout and stochastic
    depth, and their parameters with it. The error of each sum is measured and held against ``bound``.

    Refused: a branch whose values are read elsewhere.

    Source: Bercovich et al., "FFN Fusion" (arXiv 2503.18908), section 5, where it is the baseline to be beaten.
    """

    name = "drop-ffn"
    kinds = ("ffn", "gated ffn", "experts")
    absence = "no FFN is added to a residual stream"
