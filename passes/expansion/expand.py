"""A larger model that computes the same: wider FFNs, more and larger heads, a wider stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from rewrite.axes.analyze import analyze
from rewrite.axes.fills import Init
from rewrite.axes.growth import grow
from rewrite.axes.kinds import KINDS, group_of, growth_of, obstacle, of_kind, prepare
from rewrite.errors import RewriteError
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.pipeline.sizes import check_size, grown
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.axes.dims import Dim
    from rewrite.axes.table import Table
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class Site(NamedTuple):
    path: str
    types: tuple[str, ...]
    dim: Dim
    size: int


@dataclass(frozen=True)
class Expand(Pass):
    """Grow a model in any of its dimensions, the function kept: W1' = [W1; M], b1' = [b1; M], W2' = [W2, 0].

    ``ffn`` gives each FFN more units, ``heads`` each attention more heads (query heads; where they share key heads, whole
    groups), ``value_dim`` longer values: what writes the new units is free, what reads them is 0. ``head_dim`` gives longer
    queries and keys, free in the queries and 0 in the keys, which are scaled by √(k'/k) where attention divides by √k'.
    ``hidden`` widens the stream: what writes to it is 0 in the new units, what reads them is free, each RMSNorm's gain is
    scaled by √(h/h') and its eps by h/h'. Sizes are absolute (`512`), more (`+4`) or times (`2x`), any of them at once.
    ``where`` chooses by the name of the dimension: `rewrite axes MODEL` prints them.

    The forward and the gradients of all old parameters are the same, and the new parameters train. ``init`` says what free
    entries are: `normal` at the deviation of the weight, `orthogonal`, `zero` (zeros and ones: a partial identity),
    `hadamard`, or `copy` of the units there are.

    Refused where every place has an obstacle, by name: a dimension that cannot change, or whose entries meet each other in
    a norm or a softmax; head_dim under rotary embeddings or QK-norm; hidden under LayerNorm (run `rmsnorm` first) or where
    it is the model's output; heads that are no multiple of the group; a size below today's. Other places are left alone.

    Source: Gesmundo and Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023
    (arXiv 2308.06103); the paper leaves eps as it is.
    """

    name = "expand"
    ffn: str = option("", "size of the FFNs: 512, +64 or 2x")
    heads: str = option("", "number of query heads: 16, +4 or 2x")
    head_dim: str = option("", "size of a head's queries and keys")
    value_dim: str = option("", "size of a head's values")
    hidden: str = option("", "size of the stream")
    init: Init = option("normal", "what free entries are: normal, zero, orthogonal, hadamard or copy")
    where: Selector = option(Selector("*"), "dimensions to grow, by name: path glob, type:, re:, !, several with |")

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in KINDS:
            if getattr(self, kind):
                check_size(getattr(self, kind), f"expand: {kind}")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        table = analyze(program)
        sites = [site for kind in KINDS if getattr(self, kind) for site in self._sites(kind, program, table, context)]
        chosen = context.choose(sites, self.where)
        growths = [(s.types[0], growth_of(program, table, s.types[0], s.dim, s.size)) for s in chosen]
        for kind, growth in growths:
            prepare(context.edit, table, kind, growth)
        if growths:
            grow(context.edit, table, [g for _, g in growths], self.init, torch.Generator().manual_seed(context.seed))

    def _sites(self, kind: str, program: Program, table: Table, context: Context) -> Iterator[Site]:
        """The dimensions of a kind that can grow; raises RewriteError where there are some and none can."""
        named = dict(of_kind(table, kind))
        if kind == "value_dim" and not named and any(of_kind(table, "head_dim")):
            raise RewriteError("expand: keys and values have one size in this model: head_dim grows both")
        reasons = {name: obstacle(program, table, kind, name, dim) for name, dim in named.items()}
        if named and all(reasons.values()):
            name, reason = next(iter(reasons.items()))
            raise RewriteError(f"expand: {kind} cannot grow ({name}): {reason}")
        for name, dim in named.items():
            if reasons[name]:
                context.skip(name, reasons[name])
                continue
            size = self._size(kind, name, dim.size, group_of(table, name))
            if size > dim.size:
                yield Site(name, (kind,), dim, size)

    def _size(self, kind: str, name: str, size: int, group: int) -> int:
        """The new size; for heads in groups their number is given in query heads."""
        wanted = grown(getattr(self, kind), name, size * group)
        if wanted % group:
            near = wanted + group - wanted % group
            raise RewriteError(
                f"expand: {wanted} heads ({name}) are no whole groups of {group}, which share keys: {near} are"
            )
        return wanted // group
