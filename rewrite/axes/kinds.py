"""The kinds of dimensions that a model can be grown in, what keeps one of them from it, and how each grows.

| kind | new entries | what follows |
| --- | --- | --- |
| ffn, heads, value_dim | written freely, read as 0 | |
| head_dim | free in queries, 0 in keys (and read as 0 in values) | keys times √(k'/k) where 1/√k' is the scale |
| hidden | written as 0, read freely | gain and eps of every RMSNorm |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.layers import ScaledDotProductAttention
from rewrite.graph.program import Program

from .call import Score
from .dims import Dim
from .followers import MEANS_OF_GRADIENTS
from .growth import READERS, WRITERS, Growth
from .keys import keys_of
from .rms import norms_along, rescale, zero_obstacle
from .table import Table

KINDS: dict[str, tuple[str, ...]] = {
    "ffn": ("ffn",),
    "heads": ("heads", "kv_heads"),
    "head_dim": ("head_dim",),
    "value_dim": ("value_dim",),
    "hidden": ("hidden",),
}
"""Each kind, with the names in the table that are of it."""
KEEPING = frozenset({"in", "batch", "elementwise", "group", "even"})
_ALSO = {
    **{kind: {"order", "shift"} for kind in ("ffn", "heads", "value_dim")},
    "head_dim": {"score", "scale"},
    "hidden": {"norm"},
}
"""How else entries of a kind may meet, since that is seen to: new ones are the last, and nothing reads them at first."""


def of_kind(table: Table, kind: str) -> Iterator[tuple[str, Dim]]:
    """The dimensions of a kind, by name; of a grouped attention the key and value heads."""
    yield from ((name, dim) for name, dim in table.named.items() if name.split(".")[0] in KINDS[kind])


def group_of(table: Table, name: str) -> int:
    """How many query heads share a key head, 1 where each has its own."""
    kind, _, rest = name.partition(".")
    dim = table.named.get(f"group.{rest}")
    return dim.size if kind == "kv_heads" and dim is not None else 1


def obstacle(program: Program, table: Table, kind: str, name: str, dim: Dim) -> str:
    """Why a dimension cannot grow with the function kept, and the way out; empty if it can."""
    if kind == "head_dim" and _paired(table, dim):
        return (
            "its channels are paired or parted, as rotary embeddings do: a longer head would turn others; grow value_dim or "
            "heads"
        )
    if dim.rigid:
        return dim.rigid
    meeting = sorted(dim.uses - KEEPING - {MEANS_OF_GRADIENTS} - _ALSO.get(kind, set()))
    if "norm" in meeting and kind == "head_dim":
        return "queries and keys are normalized along it (QK-norm): new channels would be felt; grow value_dim or heads"
    if meeting == ["output"]:
        return "the model's output has this size: grow a model with a head, whose output is another"
    if meeting:
        return f"its entries meet in {', '.join(meeting)}: new ones would be felt"
    if kind == "hidden":
        return zero_obstacle(program, table, dim)
    if kind == "head_dim":
        return _without_keys(program, table, dim)
    return ""


def _paired(table: Table, dim: Dim) -> bool:
    """Whether a score goes over several atoms, or one of them several times."""
    return any(len(score.dim.atoms()) > 1 for score in table.scores if dim in score.dim.atoms())


def _without_keys(program: Program, table: Table, dim: Dim) -> str:
    try:
        keys_of(program, table, dim)
    except RewriteError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Scaled:
    """x -> x times one factor for each entry along an axis."""

    factors: torch.Tensor
    axis: int

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The new tensor."""
        shape = [-1 if i == self.axis else 1 for i in range(tensor.dim())]
        return tensor * self.factors.to(tensor).reshape(shape)


def growth_of(program: Program, table: Table, kind: str, dim: Dim, size: int) -> Growth:
    """How a dimension of a kind grows to a size."""
    if kind == "hidden":
        return Growth(dim, size, WRITERS)
    if kind == "head_dim":
        return Growth(dim, size, READERS, keys_of(program, table, dim).of)
    return Growth(dim, size)


def prepare(edit: Editor, table: Table, kind: str, growth: Growth) -> None:
    """Change what there is so that it stays the same once the dimension has grown: gains and eps of norms, keys."""
    program = edit.program
    if kind == "hidden":
        rescale(edit, norms_along(program, table, growth.dim), growth.dim.size / growth.size)
    if kind == "head_dim":
        _scale_keys(edit, table, growth)


def _scale_keys(edit: Editor, table: Table, growth: Growth) -> None:
    """Keys times √(k'/k) where the scores are divided by √k', the size of a head."""
    keys = keys_of(edit.program, table, growth.dim)
    scaled = [score for score in keys.scores if _own_scale(edit.program, score) is not None]
    if not scaled:
        return
    if len(scaled) < len(keys.scores):
        raise RewriteError(f"{scaled[0].node.name} scales by the size of a head, and {keys.scores[0].node.name} does not")
    for score in scaled:
        path = str(score.node.target)
        if edit.program.layer(score.node).scale is not None:
            edit.set_attribute(path, "scale", 1 / math.sqrt(growth.size))
    factor = math.sqrt(growth.size / growth.dim.size)
    for (name, axis), flags in keys.entries.items():
        factors = torch.ones(len(flags), dtype=torch.float64)
        factors[torch.tensor(flags)] = factor
        edit.set_parameter(name, Scaled(factors, axis), name)


def _own_scale(program: Program, score: Score) -> float | None:
    """The scale of an attention if it is one over the root of its head's size."""
    layer: Any = program.layer(score.node) if score.node.op == "call_module" else None
    if not isinstance(layer, ScaledDotProductAttention):
        return None
    usual = 1 / math.sqrt(score.dim.size)
    return usual if layer.scale is None or math.isclose(layer.scale, usual, rel_tol=1e-9) else None
