"""Rules of mixtures of experts whose weights are stacked: one matrix product for each expert's share of the rows."""

from __future__ import annotations

from .call import Axes, Call
from .operators import roles, rule
from .products import contract


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def _grouped(call: Call) -> Axes:
    """rows [S, in] times weight [experts, in, out], where offs [experts] says which rows are whose."""
    rows, weight = ("self", "mat2") if "mat2" in call.named else ("input", "weight")
    own, stacked = call.axes(rows), call.axes(weight)
    contract(call, own[-1], stacked[1], call.named[rows], call.named[weight])
    stacked[0].use("expert")
    if call.axes("offs"):
        call.unify(stacked[0], call.axes("offs")[0])
    roles(call, weight, {0: "expert", 1: "in", 2: "out"})
    return [*own[:-1], stacked[2]]
