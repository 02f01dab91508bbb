"""Growing dimensions with the function kept: new entries are written freely and read as 0, or written as 0 and read freely.

Units of an FFN and heads are of the first kind: what reads them is 0. The hidden units of a stream are of the second: what
writes them is 0, and so is a bias that is added to them. Any number of dimensions grow at once, in one resize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rewrite.graph.edit import Editor

from .call import Place
from .dims import Dim, Vector, vector_of
from .fills import Block, Init, filled
from .resize import note_values, resize
from .table import Table

READERS = frozenset({"in"})
"""Zero where the new entries are read."""
WRITERS = frozenset({"out", "added"})
"""Zero where they are written."""

Entries = Callable[[str, int], Sequence[bool] | None]
"""(name, axis) -> which of the axis's old entries are meant; None for none of them."""


@dataclass(frozen=True)
class Growth:
    """An atom with more entries. A new one is 0 along an axis in a role of ``zero``; and where ``entries`` says so, for an
    axis of several parts (queries, keys and values in one matrix), by the old entry beside it.
    """

    dim: Dim
    size: int
    zero: frozenset[str] = READERS
    entries: Entries = field(default=lambda name, axis: None)

    @property
    def vector(self) -> list[int]:
        """The old entries, then new ones."""
        return [*range(self.dim.size), *[-1] * (self.size - self.dim.size)]

    @property
    def beside(self) -> list[int]:
        """For each entry an old one of its kind: the first ones again and again."""
        return [i % self.dim.size for i in range(self.size)]


def grow(edit: Editor, table: Table, growths: Sequence[Growth], init: Init, generator: torch.Generator) -> None:
    """Give atoms more entries, everywhere, so that nothing is felt of them."""
    chosen = {growth.dim: growth.vector for growth in growths}
    resize(edit, table, chosen, _Filling(growths, init, generator))
    known = {growth.dim: growth.vector for growth in growths if growth.zero == WRITERS}
    note_values(edit, table, known, chosen.keys() - known.keys())


@dataclass(frozen=True)
class _Filling:
    """What the new entries of each tensor are: 0, drawn, or those of an old unit where they go along with it."""

    growths: Sequence[Growth]
    init: Init
    generator: torch.Generator

    def __call__(
        self, name: str, tensor: torch.Tensor, places: Sequence[Place], shape: tuple[int, ...]
    ) -> torch.Tensor | None:
        if not tensor.is_floating_point():
            return None
        if tensor.is_meta:
            return tensor.new_empty(shape)
        dims = {place.axis: place.dim for place in places}
        roles = {axis: {place.role for place in places if place.axis == axis} for axis in dims}
        beside = {growth.dim: growth.beside for growth in self.growths}
        copied, kept = tensor, torch.ones((), dtype=torch.bool)
        new = [torch.zeros(size, dtype=torch.bool) for size in shape]
        for axis, dim in dims.items():
            old = vector_of(dim, beside)
            copied = copied.index_select(axis, torch.tensor(old, device=tensor.device))
            zero = torch.zeros(shape[axis], dtype=torch.bool)
            for growth in self.growths:
                fresh = _fresh(dim, growth, beside)
                new[axis] |= fresh
                meant = growth.entries(name, axis)
                here = torch.tensor(meant)[old] if meant is not None else torch.tensor(bool(roles[axis] & growth.zero))
                zero |= fresh & here
            kept = kept & ~zero.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        if any(role in ("out", "in") for axis in roles for role in roles[axis]):
            into = tuple(axis for axis in range(len(shape)) if "out" not in roles.get(axis, set()))
            copied = filled(self.init, Block(tensor, copied, tuple(new), into), self.generator)
        return torch.where(kept.to(tensor.device), copied, torch.zeros_like(copied))


def _fresh(dim: Dim, growth: Growth, beside: Mapping[Dim, Vector]) -> torch.Tensor:
    """Which entries of a dimension are new because of one atom."""
    return torch.tensor(vector_of(dim, {**beside, growth.dim: growth.vector})) < 0
