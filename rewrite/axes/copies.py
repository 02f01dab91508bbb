"""Growing dimensions by copies of their units: what writes them is copied, what reads them is split among the copies.

A unit x_j with m copies is read by W_j/m + N_i with Σ N_i = 0: the sum is what it was, and the copies are not alike. Where
the new size is no multiple of the old one, a stream's rest is its mean (LayerNorm takes mean and variance along it, which
stay in proportion) or 0 (RMSNorm), and eps and gain change by the ratio c = q D / D', q the copies of each unit.

Sources: Wang et al., LEMON, ICLR 2024; Samragh et al., HyperCloning, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from rewrite.errors import RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import attribute

from .call import Place
from .dims import Dim, vector_of
from .resize import along, note_values, resize_numbers
from .table import Table

Rest = Literal["none", "zero", "mean"]


@dataclass(frozen=True)
class Copies:
    """An atom whose units are copied, in order and again from the first. With a ``rest`` only whole rounds of them are, and
    what is left of the new size holds 0 or the mean of all; ``at_rest`` says otherwise for tensors by name. ``free(name)``
    tells that a tensor reads 0 there.
    """

    dim: Dim
    size: int
    rest: Rest = "none"
    free: Callable[[str], bool] = field(default=lambda name: True)
    at_rest: Mapping[str, Rest] = field(default_factory=dict)

    @property
    def vector(self) -> list[int]:
        """For each new entry the old one that it copies, -1 for those of the rest."""
        whole = self.size if self.rest == "none" else self.size - self.size % self.dim.size
        return [i % self.dim.size if i < whole else -1 for i in range(self.size)]


def copy_units(edit: Editor, table: Table, found: Sequence[Copies], noise: float, generator: torch.Generator) -> None:
    """Give atoms more entries by copies, everywhere. ``noise`` is the deviation of what tells copies apart, relative to the
    split weight's.

    Raises RewriteError where a tensor writes and reads the same units: it cannot be copied and split.
    """
    chosen = {copies.dim: copies.vector for copies in found}
    made = {}
    for name, places in along(table, chosen).items():
        tensor = attribute(edit.program.module, name)
        by_axis = {axis: [p for p in places if p.axis == axis] for axis in dict.fromkeys(p.axis for p in places)}
        axes = [_axis(name, axis, own, found) for axis, own in by_axis.items()]
        changed = [axis for axis in axes if list(axis.source) != list(range(tensor.shape[axis.axis]))]
        if changed:
            made[name] = Copied(tuple(changed), _noise(tensor, changed, noise, generator))
    resize_numbers(edit, table, chosen)
    for name, compute in made.items():
        edit.set_parameter(name, compute, name)
    flows = ("hidden", "channels")  # what is copied inside a branch is held with it
    known = {c.dim: c.vector for c in found if c.rest != "mean" and table.name_of(c.dim).split(".")[0] in flows}
    note_values(edit, table, known, chosen.keys() - known.keys())


@dataclass(frozen=True)
class Axis:
    """One axis: ``source`` the old entry of each new one (-1 for the rest); read axes are ``split`` among copies.

    In the rest of an axis that is written stands the mean of all where ``mean``, else 0; where it is read, free weights if
    ``free``, else such as cancel.
    """

    axis: int
    source: tuple[int, ...]
    split: bool
    mean: bool
    free: bool

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with this axis copied, or split."""
        source = torch.tensor(self.source, device=tensor.device)
        shape = [-1 if i == self.axis else 1 for i in range(tensor.dim())]
        found = tensor.index_select(self.axis, source.clamp_min(0))
        if self.split:
            found = found / self.counts.to(found).reshape(shape)
        rest = (source < 0).reshape(shape)
        if -1 not in self.source:
            return found
        return torch.where(rest, tensor.mean(self.axis, keepdim=True) if self.mean else torch.zeros_like(found), found)

    @property
    def counts(self) -> torch.Tensor:
        """How many copies the unit of each entry has."""
        groups = torch.tensor(self.source) + 1
        return torch.bincount(groups)[groups]

    def cancelled(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise that cancels over the copies of each unit, and over the rest unless it is free."""
        groups = torch.tensor(self.source) + 1
        moved = noise.movedim(self.axis, 0)
        sums = torch.zeros(int(groups.max()) + 1, *moved.shape[1:], dtype=noise.dtype).index_add(0, groups, moved)
        counts = torch.bincount(groups, minlength=len(sums)).clamp_min(1).reshape([-1] + [1] * (moved.dim() - 1))
        means = sums / counts
        if self.free:
            means[0] = 0
        return (moved - means[groups]).movedim(0, self.axis)


@dataclass(frozen=True)
class Copied:
    """The map of one tensor: its axes copied and split, noise that cancels added."""

    axes: tuple[Axis, ...]
    noise: torch.Tensor | None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The new tensor."""
        for axis in self.axes:
            tensor = axis(tensor)
        return tensor if self.noise is None else tensor + self.noise.to(tensor)


def _axis(name: str, axis: int, places: Sequence[Place], found: Sequence[Copies]) -> Axis:
    """What becomes of one axis of a tensor."""
    dim, roles = places[0].dim, {place.role for place in places}
    atoms = dim.atoms()
    own = [copies for copies in found if any(copies.dim is atom for atom in atoms)]
    if own and {"in", "out"} <= roles:
        raise RewriteError(f"{name} writes units that it reads too, tied: untie it first")
    rest = next((copies for copies in own if copies.rest != "none"), None)
    if rest is not None and len(atoms) > 1:
        raise RewriteError(f"{name} has them beside or within others: use a multiple of {rest.dim.size}")
    source = tuple(vector_of(dim, {copies.dim: copies.vector for copies in found}))
    mean = rest is not None and rest.at_rest.get(name, rest.rest) == "mean" and "in" not in roles
    return Axis(axis, source, "in" in roles, mean, rest is None or rest.free(name))


def _noise(tensor: torch.Tensor, axes: Sequence[Axis], scale: float, generator: torch.Generator) -> torch.Tensor | None:
    """What tells the copies apart where they are read."""
    split = [axis for axis in axes if axis.split]
    if not split or not scale or not tensor.is_floating_point() or tensor.numel() < 2:
        return None
    shape = list(tensor.shape)
    for axis in axes:
        shape[axis.axis] = len(axis.source)
    grown = math.prod(shape[a.axis] / tensor.shape[a.axis] for a in split)
    deviation = 1.0 if tensor.is_meta else float(tensor.detach().double().std())
    noise = torch.randn(shape, generator=generator, dtype=torch.float64) * (scale * deviation / math.sqrt(grown))
    for axis in split:
        noise = axis.cancelled(noise)
    return noise
