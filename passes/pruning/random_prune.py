"""Random masks on the weights of linear and convolutional layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from rewrite.analysis.densities import Ratios, densities
from rewrite.analysis.linears import linears
from rewrite.analysis.unseen import unseen_text
from rewrite.graph.tree import names_of_tensors
from rewrite.pipeline.masking import MASKED, Masked, masked, masked_formula, random_mask
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class Site(NamedTuple):
    """A layer with a weight to mask."""

    path: str
    types: tuple[str, ...]
    layer: Any


@dataclass(frozen=True)
class RandomPrune(Pass):
    """Mask the weights of linear and convolutional layers at random: W becomes W ∘ M with M in {0, 1}.

    The share ``sparsity`` of all their weights becomes 0. ``ratios`` spreads it: ``uniform`` gives each layer the same
    density; ``er`` (Erdos and Renyi) one in proportion to (n_in + n_out)/(n_in n_out), ``erk`` to the sum over the product
    of all sizes of the weight, kernels included; layers whose density would exceed 1 are dense. Each layer keeps an exact
    count, at positions drawn from ``seed`` and its path. Weights keep their names; what is masked gets no gradient. A layer
    that shares its weight is left alone: a mask on one use would leave the other dense.

    It is a result about training from a mask: pruned at random, a trained network is destroyed.

    Source: Liu et al., "The Unreasonable Effectiveness of Random Pruning", ICLR 2022 (arXiv 2202.02643); Evci et al.,
    "Rigging the Lottery", ICML 2020 (arXiv 1911.11134), section 3, for the ratios.
    """

    name = "random-prune"
    inserts = tuple(MASKED.values())
    sparsity: float = option(0.9, "share of the weights that are masked", at_least=0, below=1)
    ratios: Ratios = option("erk", "how the sparsity is spread over the layers: uniform, er, erk")
    seed: int = option(0, "seed of the positions", at_least=0)
    where: Selector = option(Selector("*"), "layers to mask: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        names = names_of_tensors(program.module)
        self._tell_of_the_rest(program, context)
        free = []
        for site in context.choose(_sites(program), self.where):
            shared = len(names[id(site.layer.weight)]) > 1
            if shared:
                context.skip(site.path, "it shares its weight: a mask would leave the other use dense")
            else:
                free.append(site)
        shares = densities([tuple(s.layer.weight.shape) for s in free], 1 - self.sparsity, self.ratios)
        for site, density in zip(free, shares, strict=True):
            mask = random_mask(site.layer.weight, density, f"{self.seed}/{site.path}")
            context.edit.replace_layer(site.path, masked(site.layer, mask))

    def _tell_of_the_rest(self, program: Program, context: Context) -> None:
        for linear in linears(program):
            if linear.layer is None:
                weights = ", ".join(dict.fromkeys(rows.path for rows in linear.weight))
                context.skip(linear.path, f"it multiplies with {weights} in its own code: there is no layer to mask")
        if rest := unseen_text(program, "linear", "convolution"):
            context.warn(rest)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The layer of torch on the weight where the mask is True and on 0 elsewhere."""
        return masked_formula(new, inputs[0])


def _sites(program: Program) -> list[Site]:
    """Linear and convolutional layers without a mask, each once."""
    found = {}
    for node, layer in program.layers():
        plain = isinstance(layer, tuple(MASKED)) and not isinstance(layer, Masked)
        if plain and getattr(layer, "padding_mode", "zeros") == "zeros":
            found[str(node.target)] = Site(str(node.target), (type(layer).__name__,), layer)
    return list(found.values())
