"""Random masks on the weights of linear and convolutional layers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.analysis.linears import linears
from rewrite.analysis.unseen import unseen_text
from rewrite.graph.layers import TransposedLinear
from rewrite.graph.like import like
from rewrite.graph.tree import names_of_tensors
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

Ratios = Literal["uniform", "er", "erk"]


class Masked(nn.Module):
    """A layer whose weight counts where ``mask`` is True: y = layer(x) with weight ∘ mask; weight and bias keep their names.

    ``mask`` is a buffer of the weight's shape, saved with the model.
    """

    def masked(self) -> torch.Tensor:
        """weight ∘ mask."""
        found: torch.Tensor = self._parameters["weight"] * self._buffers["mask"]  # type: ignore[operator]
        return found


class MaskedLinear(Masked, nn.Linear):
    """y = x (W ∘ M)ᵀ + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.masked(), self.bias)


class MaskedTransposedLinear(Masked, TransposedLinear):
    """y = x (W ∘ M) + b, W [in_features, out_features]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.masked())


class MaskedConv1d(Masked, nn.Conv1d):
    """y = conv(x, W ∘ M) + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(x, self.masked(), self.bias)
        return found


class MaskedConv2d(Masked, nn.Conv2d):
    """y = conv(x, W ∘ M) + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(x, self.masked(), self.bias)
        return found


_KINDS: Mapping[type[nn.Module], Any] = {
    nn.Linear: MaskedLinear,
    TransposedLinear: MaskedTransposedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
}


class Site(NamedTuple):
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
    inserts = (MaskedLinear, MaskedTransposedLinear, MaskedConv1d, MaskedConv2d)
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
            kind = next(made for base, made in _KINDS.items() if isinstance(site.layer, base))
            context.edit.replace_layer(site.path, like(site.layer, kind, mask=self._mask(site, density)))

    def _tell_of_the_rest(self, program: Program, context: Context) -> None:
        for linear in linears(program):
            if linear.layer is None:
                weights = ", ".join(dict.fromkeys(rows.path for rows in linear.weight))
                context.skip(linear.path, f"it multiplies with {weights} in its own code: there is no layer to mask")
        if rest := unseen_text(program, "linear", "convolution"):
            context.warn(rest)

    def _mask(self, site: Site, density: float) -> torch.Tensor:
        """A mask of the weight's shape with round(density · n) ones, drawn from the seed and the path."""
        weight = site.layer.weight
        if weight.is_meta:
            return torch.ones_like(weight, dtype=torch.bool)
        digest = hashlib.sha256(f"{self.seed}/{site.path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: round(density * weight.numel())]] = True
        return mask.reshape(weight.shape).to(weight.device)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The layer of torch on the weight where the mask is True and on 0 elsewhere."""
        (x,) = inputs
        assert isinstance(new, Masked)
        layer: Any = new
        weight = torch.where(layer.mask, layer.weight, 0)
        if isinstance(new, MaskedLinear | MaskedTransposedLinear):
            product: torch.Tensor = x @ (weight.t() if isinstance(new, MaskedLinear) else weight)
            return product if layer.bias is None else product + layer.bias
        convolve = F.conv1d if isinstance(new, MaskedConv1d) else F.conv2d
        found: torch.Tensor = convolve(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return found


def _sites(program: Program) -> list[Site]:
    """Linear and convolutional layers without a mask, each once."""
    found = {}
    for node, layer in program.layers():
        plain = isinstance(layer, tuple(_KINDS)) and not isinstance(layer, Masked)
        if plain and getattr(layer, "padding_mode", "zeros") == "zeros":
            found[str(node.target)] = Site(str(node.target), (type(layer).__name__,), layer)
    return list(found.values())


def densities(shapes: Sequence[tuple[int, ...]], density: float, ratios: Ratios) -> list[float]:
    """The density of each weight, so that over all of them the share ``density`` is kept.

    With sizes s of a weight and n = Π s, raw = Σ s / n (``er``: of the first two sizes); its density is eps · raw, with
    eps such that the counts add up; the weights for which that exceeds 1 are dense, the largest first.
    """
    if ratios == "uniform" or not shapes:
        return [density] * len(shapes)
    counts = [math.prod(shape) for shape in shapes]
    sizes = [shape if ratios == "erk" else shape[:2] for shape in shapes]
    raw = [sum(size) / math.prod(size) for size in sizes]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        kept = density * sum(counts) - sum(counts[i] for i in dense)
        eps = kept / sum(raw[i] * counts[i] for i in rest) if rest else 0.0
        largest = max((raw[i] for i in rest), default=0.0)
        if eps * largest <= 1:
            return [1.0 if i in dense else max(0.0, eps * raw[i]) for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == largest}
