"""A merged linear layer as the layers that it was made of."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.utils import skip_init

from rewrite.graph.nodes import aten, attribute, overload
from rewrite.graph.tree import names_of_tensors
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract

from .merge_linears import MergedLinear

if TYPE_CHECKING:
    from torch.fx import Node

    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class Site(NamedTuple):
    """A merged layer and its call."""

    path: str
    types: tuple[str, ...]
    node: Node
    layer: MergedLinear


@dataclass(frozen=True)
class SplitLinears(Pass):
    """Give the layers back that `merge-linears` made one: q = W_q x + b_q, with the rows of [W_q; W_k; W_v] that are W_q.

    Names, order and bytes are those from before the merge; what was trained or folded into the merged layer since then
    stays with its rows. A merged layer is left alone, with the reason, where it is called more than once, shares a
    tensor, its output is read in another way than by the split, or an old name is taken.
    """

    name = "split-linears"
    absence = "no layer of it was made by merge-linears"
    where: Selector = option(Selector("*"), "merged layers to split: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        for site in context.choose(_sites(program), self.where):
            reason = _obstacle(site, program)
            if reason:
                context.skip(site.path, reason)
            else:
                _split(site, context)


def _sites(program: Program) -> list[Site]:
    merged = {
        str(node.target): Site(str(node.target), (type(layer).__name__,), node, layer)
        for node, layer in program.layers()
        if type(layer) is MergedLinear
    }
    return list(merged.values())


def _obstacle(site: Site, program: Program) -> str:
    """Why a merged layer must stay; empty if nothing stands in the way."""
    if sum(n.target == site.path for n in program.graph.nodes) > 1:
        return "it is called more than once"
    names = names_of_tensors(program.module)
    shared = [n for t in (site.layer.weight, site.layer.bias) for n in names.get(id(t), ()) if _parent(n) != site.path]
    if shared:
        return f"it shares a tensor with {shared[0]}"
    taken = next((path for path in site.layer.paths if attribute(program.module, path) is not None), None)
    if taken is not None:
        return f"there is a module at {taken} already"
    others = [user for user in site.node.users if not _is_the_split(user, site)]
    return f"{others[0].name} reads it whole" if others or not site.node.users else ""


def _is_the_split(user: Node, site: Site) -> bool:
    apart = overload(user) is aten.split_with_sizes.default and tuple(user.args[1]) == site.layer.sizes  # type: ignore[arg-type]
    last = user.args[2:] in ((-1,), (site.node.meta["val"].dim() - 1,))
    return apart and last and all(n.target is operator.getitem for n in user.users)


def _split(site: Site, context: Context) -> None:
    edit, layer = context.edit, site.layer
    start, made, here = 0, [], edit.place(site.path)
    for path, size, place in zip(layer.paths, layer.sizes, layer.places, strict=True):
        linear = edit.insert_layer(path, _rows_of(layer, size), site.node.args, after=site.node, place=_beside(place, here))
        for name in ("weight", "bias") if layer.bias is not None else ("weight",):
            rows = functools.partial(_rows, start=start, count=size)
            edit.set_parameter(f"{path}.{name}", rows, f"{site.path}.{name}")
        start += size
        made.append(linear)
    for parts in list(site.node.users):
        for item in list(parts.users):
            edit.rewire(item, made[item.args[1]])  # type: ignore[index]
            edit.remove(item)
        edit.remove(parts)
    edit.remove(site.node)
    edit.sweep()


def _beside(place: tuple[int, ...], here: tuple[int, ...]) -> tuple[int, ...]:
    """A place in the module tree from before the merge, while the merged layer still stands ``here``."""
    depth = len(here) - 1
    moved = place[:depth] == here[:depth] and len(place) > depth and place[depth] >= here[depth]
    return (*place[:depth], place[depth] + 1, *place[depth + 1 :]) if moved else place


def _rows_of(layer: MergedLinear, count: int) -> nn.Linear:
    """A linear layer for some rows of a merged one, its values still to be set."""
    weight, bias = layer.weight, layer.bias
    made: nn.Linear = skip_init(
        nn.Linear, layer.in_features, count, bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    made.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        made.bias.requires_grad_(bias.requires_grad)
    made.train(layer.training)
    return made


def _rows(stacked: torch.Tensor, start: int, count: int) -> torch.Tensor:
    return stacked.narrow(0, start, count)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
