"""What becomes of a value that a pass moves on purpose: the new value as a function of the old one, x' = r(x).

A relation is given the old value in float64 and returns the new one; it is made of differentiable operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

Relation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Centered:
    """x - mean x along an axis."""

    axis: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The new value."""
        return x - x.mean(self.axis, keepdim=True)


@dataclass(frozen=True)
class Scaled:
    """factor · x."""

    factor: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The new value."""
        return self.factor * x


@dataclass(frozen=True)
class Picked:
    """The entries of the old value along an axis, by number; 0, or the mean of all old ones, for -1."""

    axis: int
    entries: tuple[int, ...]
    mean: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The new value."""
        entries = torch.tensor(self.entries, device=x.device)
        found = x.index_select(self.axis, entries.clamp_min(0))
        if bool((entries >= 0).all()):
            return found
        shape = [-1 if i == self.axis % x.dim() else 1 for i in range(x.dim())]
        rest = x.mean(self.axis, keepdim=True) if self.mean else torch.zeros_like(found)
        return torch.where((entries < 0).reshape(shape), rest, found)


@dataclass(frozen=True)
class Chain:
    """One relation after the other."""

    links: tuple[Relation, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The new value."""
        for link in self.links:
            x = link(x)
        return x


def chained(first: Relation, second: Relation) -> Relation:
    """``second`` after ``first``."""
    parts = (part.links if isinstance(part, Chain) else (part,) for part in (first, second))
    return Chain(tuple(link for links in parts for link in links))


def moved(moves: Iterable[tuple[Sequence[str], Mapping[str, Relation]]]) -> dict[str, Relation | None]:
    """What became of each node's value after some moves in order; None where one of them said no relation."""
    found: dict[str, Relation | None] = {}
    for names, relations in moves:
        for name in names:
            before, relation = found.get(name), relations.get(name)
            known = relation is not None and (name not in found or before is not None)
            found[name] = None if not known or relation is None else chained(before, relation) if before else relation
    return found
