"""One trained gain for all that a branch adds (ReZero)."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.pipeline.gating import Gain, Gating


@dataclass(frozen=True)
class ReZero(Gating):
    """Scale what each branch adds by one trained number: x + a F(x).

    ``mode=exact`` keeps the function: a starts at `init` (1), and the weights of the projection before it are divided by
    that. ``mode=new`` starts at a = 0, as the paper does: each block is the identity then, which suits branches that are
    new and throws away what trained ones know. Norms stay; `norm-free` takes them out.

    Left alone, with the reason: branches that are scaled already; where weights have to be divided, those that do not end
    in a projection of their own.

    Source: Bachlechner et al., "ReZero is All You Need: Fast Convergence at Large Depth", UAI 2021 (arXiv 2003.04887),
    equation 1.
    """

    name = "rezero"
    inserts = (Gain,)
    single = True
    start = 0.0
