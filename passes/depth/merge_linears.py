"""Linear layers that read one value, as one linear layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from rewrite.analysis.siblings import Sibling, Within, joined_name, siblings
from rewrite.graph.nodes import aten, attribute
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class MergedLinear(nn.Linear):
    """Several linear layers as one: y = [W_1; W_2; ...] x + [b_1; b_2; ...], to be split along its last axis.

    ``paths`` are the layers that it stands for, ``sizes`` their numbers of outputs, ``places`` where each stood in the
    module tree.
    """

    def __init__(
        self, paths: Sequence[str], sizes: Sequence[int], places: Sequence[tuple[int, ...]], like: nn.Linear
    ) -> None:
        nn.Module.__init__(self)
        self.paths, self.sizes, self.places = tuple(paths), tuple(sizes), tuple(places)
        self.in_features, self.out_features = like.in_features, sum(sizes)
        weight, bias = like.weight, like.bias
        self.weight = nn.Parameter(weight.new_empty(self.out_features, self.in_features), weight.requires_grad)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.new_empty(self.out_features), bias.requires_grad)
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sizes={self.sizes}"


class Site(NamedTuple):
    """Siblings that become one layer."""

    path: str
    types: tuple[str, ...]
    members: tuple[Sibling, ...]
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Make linear layers that read one value one layer: [q; k; v] = [W_q; W_k; W_v] x + [b_q; b_k; b_v], then split.

    One large product instead of several small ones. The function and the gradients of all old parameters are the same;
    the state_dict has `qkv_proj.weight` in place of `q_proj.weight`, `k_proj.weight` and `v_proj.weight`, the rows one
    below the other; `to_q` and `to_k` become `to_qk`, `gate_proj` and `up_proj` `gate_up_proj`. `split-linears` gives
    the old layers back. `where` chooses by the path of the merged layer.

    Left alone, with the reason: a layer that is called more than once, shares a tensor, has a class or hooks of its own,
    whose tensors the code reads or whose output is written in place; one whose bias (or none), dtype, device or
    requires_grad is another than its siblings' (a bias of zeros in place of none would be trained).
    """

    name = "merge-linears"
    absence = "no two linear layers of it read one value"
    inserts = (MergedLinear,)
    within: Within = option("block", "merge layers of one module, of one block (attention and FFN), or of the model")
    where: Selector = option(Selector("*"), "groups to merge, by merged path: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        found = siblings(program, self.within)
        for path, reason in found.obstacles.items():
            context.skip(path, reason)
        for site in context.choose(_sites(program, context, found.groups), self.where):
            _merge(site, context)
        context.edit.sweep()


def _sites(program: Program, context: Context, groups: Sequence[tuple[Sibling, ...]]) -> list[Site]:
    taken: set[str] = set()
    sites = []
    for group in groups:
        path = _free(program, _merged_path([s.path for s in group]), taken)
        taken.add(path)
        sites.append(Site(path, ("Linear",), group, tuple(context.edit.place(s.path) for s in group)))
    return sites


def _merged_path(paths: Sequence[str]) -> str:
    """One name at the module that holds all."""
    parts = [path.split(".") for path in paths]
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    return ".".join([*parts[0][:depth], joined_name([".".join(p[depth:]) for p in parts])])


def _free(program: Program, path: str, taken: set[str]) -> str:
    while path in taken or attribute(program.module, path) is not None:
        path += "_merged"
    return path


def _merge(site: Site, context: Context) -> None:
    edit, members = context.edit, site.members
    paths, sizes = [s.path for s in members], [s.layer.out_features for s in members]
    layer = MergedLinear(paths, sizes, site.places, members[0].layer)
    nodes = [s.node for s in members]
    first = min(members, key=lambda s: s.order).node
    depth = site.path.count(".") + 1
    merged = edit.insert_layer(site.path, layer, first.args, after=first, place=site.places[0][:depth])
    for name in ("weight", "bias") if layer.bias is not None else ("weight",):
        edit.set_parameter(f"{site.path}.{name}", _stacked, *(f"{path}.{name}" for path in paths))
    parts = edit.insert_function(aten.split_with_sizes.default, (merged, sizes, -1), after=merged)
    for i, node in reversed([*enumerate(nodes)]):
        edit.rewire(node, edit.insert_function(operator.getitem, (parts, i), after=parts))
        edit.remove(node)


def _stacked(*rows: torch.Tensor) -> torch.Tensor:
    """[W_1; W_2; ...]."""
    return torch.cat(rows)
