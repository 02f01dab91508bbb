"""A trained gain for each channel of what a branch adds (LayerScale)."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.pipeline.gating import Gain, Gating


@dataclass(frozen=True)
class LayerScale(Gating):
    """Scale what each branch adds by a trained gain a channel: x + s ∘ F(x).

    ``mode=exact`` keeps the function: s starts at `init` (1), and the weights of the projection before it are divided by
    that. ``mode=new`` takes s as the paper does, 1e-4 at the start, with the weights as they are: another function, near to
    the identity. The paper has 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond.

    Left alone, with the reason: branches that are scaled already; where weights have to be divided, those that do not end
    in a projection of their own.

    Source: Touvron et al., "Going deeper with Image Transformers" (CaiT), ICCV 2021 (arXiv 2103.17239), section 2.
    """

    name = "layerscale"
    inserts = (Gain,)
    single = False
    start = 1e-4
