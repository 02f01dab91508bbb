"""A smaller model inside a model: the FFN units that matter most, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from rewrite.axes.analyze import analyze
from rewrite.axes.importance import importance
from rewrite.axes.kinds import obstacle
from rewrite.axes.resize import resize
from rewrite.graph.nodes import attribute
from rewrite.graph.tree import names_of_tensors
from rewrite.pipeline.masking import MASKED, Masked, masked, masked_formula, unmasked
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.axes.dims import Dim
    from rewrite.axes.table import Table
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class Site(NamedTuple):
    """An FFN's dimension, and how many units it is to keep."""

    path: str
    types: tuple[str, ...]
    dim: Dim
    size: int


@dataclass(frozen=True)
class Slice(Pass):
    """Keep the units of FFNs that matter most: W1' = W1[m], b1' = b1[m], W2' = W2[:, m], m the first of an order.

    ``ffn`` is the share of the units that each FFN keeps, at least one. Units are ordered by importance, the product of the
    norms of what writes and reads them, ‖(W1)_i‖ ‖(W2)_:,i‖ (and of the gate's row), and kept in that order: what a smaller
    share keeps comes first in what a larger one keeps, so that one model holds the others as its first units. It is done in
    two steps, each proven: the columns of W2 that read the other units are masked, another function, which training has to
    make good; then those units go, the same function. ``where`` chooses by the name of the dimension: `rewrite axes MODEL`
    prints them.

    Left alone, with the reason: a dimension that cannot change its size, one whose units meet in a norm, and one that a
    layer reads that cannot have a mask.

    Source: Devvrit et al., MatFormer: Nested Transformer for Elastic Inference, NeurIPS 2024 (arXiv 2310.07707), section 3;
    there the units are nested by training, here by importance.
    """

    name = "slice"
    ffn: float = option(0.5, "share of the units that each FFN keeps", at_least=0, below=1)
    where: Selector = option(Selector("*"), "FFNs to slice, by the name of their dimension: path glob, type:, re:, !, |")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        sites = [site for site in self.sites(program, analyze(program), context) if site.size < site.dim.size]
        if not context.choose(sites, self.where):
            return []
        return [_Mask(self.ffn, self.where), _Cut(self.ffn, self.where)]

    def sites(self, program: Program, table: Table, context: Context) -> list[Site]:
        """The FFNs that can be sliced; why others cannot is noted."""
        found = []
        for name, dim in table.named.items():
            if name.split(".")[0] == "ffn":
                reason = obstacle(program, table, "ffn", name, dim) or _unread(program, table, dim)
                if reason:
                    context.skip(name, reason)
                else:
                    found.append(Site(name, ("ffn",), dim, max(1, round(self.ffn * dim.size))))
        return found

    def chosen(self, program: Program, table: Table, context: Context) -> list[Site]:
        """The FFNs to slice."""
        return context.choose(self.sites(program, table, context), self.where)


@dataclass(frozen=True)
class _Mask(Slice):
    """W2[:, i] = 0 for the units i that are not kept: a mask on what reads them."""

    steps = Pass.steps

    def run(self, program: Program, context: Context) -> None:
        table = analyze(program)
        for site in self.chosen(program, table, context):
            kept = torch.zeros(site.dim.size, dtype=torch.bool)
            kept[_order(program, table, site.dim)[: site.size]] = True
            for path, axis in _readers(table, site.dim):
                layer = program.module.get_submodule(path)
                weight = program.module.get_parameter(f"{path}.weight")
                along = kept.to(weight.device).reshape([-1 if i == axis else 1 for i in range(weight.dim())])
                context.edit.replace_layer(path, masked(layer, along.expand(weight.shape).clone()))

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The layer on the weight where the mask is True and on 0 elsewhere."""
        return masked_formula(new, *inputs)


@dataclass(frozen=True)
class _Cut(Slice):
    """The units that nothing reads go; those that stay are put in the order of their importance."""

    steps = Pass.steps

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        masks = {str(node.target): layer.get_buffer("mask") for node, layer in program.layers() if isinstance(layer, Masked)}
        for path in masks:
            context.edit.replace_layer(path, unmasked(program.module.get_submodule(path)))
        table = analyze(program)
        orders = {}
        for site in self.chosen(program, table, context):
            path, axis = _readers(table, site.dim)[0]
            if path in masks:
                mask = masks[path].movedim(axis, 0).flatten(1)
                kept = torch.arange(site.dim.size) < site.size if mask.is_meta else mask.any(1).cpu()
                orders[site.dim] = [i for i in _order(program, table, site.dim).tolist() if kept[i]]
        if orders:
            resize(context.edit, table, orders)


def _order(program: Program, table: Table, dim: Dim) -> torch.Tensor:
    """The units, the most important first."""
    return importance(program, table, dim).argsort(descending=True, stable=True)


def _readers(table: Table, dim: Dim) -> list[tuple[str, int]]:
    """The layers whose weight reads a dimension, each with the axis."""
    places = (place for place in table.places_of(dim) if place.role == "in")
    return list(dict.fromkeys((place.path.rpartition(".")[0], place.axis) for place in places))


def _unread(program: Program, table: Table, dim: Dim) -> str:
    """Why what reads an FFN's units cannot have a mask; empty where layers do, along a whole axis."""
    readers = [place for place in table.places_of(dim) if place.role == "in"]
    names = names_of_tensors(program.module)
    for place in readers:
        layer = attribute(program.module, place.path.rpartition(".")[0])
        if not isinstance(layer, tuple(MASKED)) or place.dim.root() is not dim.root():
            return f"{place.path}, which reads it, is no layer's weight along that dimension alone"
        if len(names[id(attribute(program.module, place.path))]) > 1:
            return f"{place.path}, which reads it, is shared"
    return "" if readers else "nothing reads it"
