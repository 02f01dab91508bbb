"""Linear layers that keep a random sketch of their input for their weight's gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.like import like
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import ESTIMATE, SAME, Contract
from rewrite.training.draws import peeked_seed
from rewrite.training.estimated import Estimated, linear_gradient, rows
from rewrite.training.lone_linears import LinearSite, lone_linears
from rewrite.training.sketch import Sketch, height, sketch_matrix, sketched

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context
    from rewrite.proof.part import Part


class _Sketching(Estimated):
    """What both layers do: their weight's gradient comes from S x."""

    ratio: float
    sketch: Sketch
    salt: int
    own = ("ratio", "sketch", "salt")

    def kept(self, x: torch.Tensor) -> tuple[Any, ...]:
        given = rows(x)
        seed = peeked_seed(self.salt)
        s = sketch_matrix(seed, given, height(given.shape[0], self.ratio), self.sketch, False)
        return s @ given, seed, self.sketch

    def estimated(self, *given: Any) -> torch.Tensor:
        found: torch.Tensor = sketched(*given)
        return found


class RandomizedLinear(_Sketching, nn.Linear):
    """y = x Wᵀ + b; dW = (S dy)ᵀ (S x) / k for a random S with k = ratio · n rows, drawn anew at each step."""

    kind = nn.Linear


class RandomizedTransposedLinear(_Sketching, TransposedLinear):
    """The same for y = x W + b."""

    kind = TransposedLinear


@dataclass(frozen=True)
class RandomizedLinearPass(Pass):
    """Estimate the weight gradients of linear layers from a random sketch of their input: dW = (S dy)ᵀ (S x) / k.

    S has k = ratio · n rows for the n rows of x, and E[Sᵀ S] = k I: the mean of dW is exact, as are the gradients of input
    and bias. Kept are S x and a seed, from which S is drawn again; each step has another one, and the forward draws what it
    would. A single draw is noisy, and the noisier the more tokens there are that have little to do with each other. A layer
    is left alone, with the reason, where its weight is shared, where another one keeps what it is given, where the sketches
    of all layers that are given the same take no less, and where a sketch of the example inputs has one row.

    Source: Bershatsky et al., "Memory-Efficient Backpropagation through Large Linear Layers" (arXiv 2201.13195).
    """

    name = "randomized-linear"
    inserts = (RandomizedLinear, RandomizedTransposedLinear)
    ratio: float = option(0.2, "rows of the sketch for each row of the input", above=0, at_most=1)
    sketch: Sketch = option("gaussian", "gaussian, rademacher, dct or rows")
    where: Selector = option(Selector("*"), "linear layers: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        # for dy at random a Gaussian S has the relative error √((n + 1) / k), and the cosine 1 / √(1 + error²) to the truth
        error = math.sqrt(1 / self.ratio)
        return Contract(forward=SAME, backward=ESTIMATE, bound=2 * error, cosine=0.5 / math.sqrt(1 + error**2))

    def run(self, program: Program, context: Context) -> None:
        found = lone_linears(program, (RandomizedLinear, RandomizedTransposedLinear))
        for salt, site in enumerate(context.choose(found, self.where)):
            reason = site.obstacle or self._obstacle(site)
            if reason:
                context.skip(site.path, reason)
            else:
                context.edit.replace_layer(site.path, self._layer(site, salt))

    def _obstacle(self, site: LinearSite) -> str:
        if site.company * self.ratio >= 1:
            return f"the sketches of {site.company} layers with one input are no smaller"
        lone = site.rows > 1 and height(site.rows, self.ratio) == 1
        return f"a sketch of one row for {site.rows} is no estimate: take a larger batch, or a larger ratio" * lone

    def _layer(self, site: LinearSite, salt: int) -> nn.Module:
        kind = RandomizedTransposedLinear if isinstance(site.layer, TransposedLinear) else RandomizedLinear
        return like(site.layer, kind, ratio=self.ratio, sketch=self.sketch, salt=salt)

    def gradient(self, part: Part, inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor]) -> Any:
        """In the mean that of the linear layer."""
        return linear_gradient(part.new, inputs[0], grad_outputs[0])
