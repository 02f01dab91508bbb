"""Self-attention dropped from chosen layers."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.pipeline.dropping import Dropping


@dataclass(frozen=True)
class DropAttention(Dropping):
    """Drop the self-attention of chosen layers: x + Attn(N x) becomes x.

    The whole branch goes: its norm, projections, scale, dropout and stochastic depth, and their parameters with it. The
    other branches of the layer stay. What is left is an approximation: the error of each sum is measured and held against
    ``bound``, and the model wants healing afterwards. Cross-attention stays, it is all that carries an encoder's output.

    Refused: a branch whose values are read elsewhere.

    Source: Bercovich et al., "FFN Fusion" (arXiv 2503.18908), section 3, which drops attention before it fuses.
    """

    name = "drop-attention"
    kinds = ("attention",)
    absence = "no attention is added to a residual stream"
