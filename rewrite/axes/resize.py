"""Resizing dimensions: every tensor, number and attribute along them changes by one rule, through the editor.

A resize gives each atom a vector: for each new entry the number of the old one that it is, or -1 for a new one. Growing,
pruning, reordering and doubling are the same call. New rows of a tensor are 0, or what ``fill`` draws.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument

from rewrite.errors import RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import attribute, literal_arguments
from rewrite.graph.relation import Chain, Picked, Relation

from .call import Attribute, Literal, Place
from .dims import Dim, Vector, size_of, vector_of
from .table import Table

Fill = Callable[[str, torch.Tensor, Sequence[Place], tuple[int, ...]], torch.Tensor | None]
"""(name, the old tensor, its places, the new shape) -> what its new entries are taken from, of the new shape; None for 0."""


@dataclass(frozen=True)
class Resized:
    """The map of one tensor: entries along each changed axis picked by number, new ones from ``new`` or 0."""

    vectors: tuple[tuple[int, tuple[int, ...]], ...]
    new: torch.Tensor | None = None

    def bare(self) -> Resized:
        """The map with 0 for new entries."""
        return Resized(self.vectors)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The new tensor."""
        kept = torch.ones((), dtype=torch.bool, device=tensor.device)
        for axis, vector in self.vectors:
            places = torch.tensor(vector, device=tensor.device)
            tensor = tensor.index_select(axis, places.clamp_min(0))
            shape = [-1 if i == axis else 1 for i in range(tensor.dim())]
            kept = kept & (places >= 0).reshape(shape)
        other = torch.zeros_like(tensor) if self.new is None else self.new.to(tensor)
        return torch.where(kept, tensor, other)


@dataclass(frozen=True)
class Hollow:
    """The map of one tensor to another size, without content: memory that nobody writes into is not taken."""

    sizes: tuple[int, ...]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The new tensor."""
        return tensor.new_empty(self.sizes)


def resize(
    edit: Editor, table: Table, chosen: Mapping[Dim, Vector], fill: Fill = lambda *_: None, *, hollow: bool = False
) -> None:
    """Give dimensions other entries, everywhere. ``chosen`` maps atoms to vectors. ``hollow`` tensors have no content.

    Raises RewriteError for a dimension that cannot change, with the reason, and where a value does not fit afterwards.
    """
    resize_numbers(edit, table, chosen)
    known: dict[Dim, tuple[int, ...]] = {}
    for path, places in along(table, chosen).items():
        tensor = attribute(edit.program.module, path)
        dims = {place.axis: place.dim.root() for place in places if not chosen.keys().isdisjoint(place.dim.atoms())}
        known.update((dim, tuple(vector_of(dim, chosen))) for dim in dims.values() if dim not in known)
        changed = {axis: known[dim] for axis, dim in dims.items() if not _is_as_before(known[dim], tensor.shape[axis])}
        if changed:
            shape = tuple(len(changed[i]) if i in changed else s for i, s in enumerate(tensor.shape))
            filled = None if hollow else Resized(tuple(sorted(changed.items())), fill(path, tensor, places, shape))
            edit.set_parameter(path, filled or Hollow(shape), path)


def _is_as_before(vector: Sequence[int], size: int) -> bool:
    """Whether each entry is the old one at its place."""
    return len(vector) == size and all(map(operator.eq, vector, range(size)))


def note_values(edit: Editor, table: Table, known: Mapping[Dim, Vector], free: Collection[Dim] = ()) -> None:
    """Tell the proof what becomes of the values along atoms whose new entries are known: copies, and 0 for -1.

    Values along an atom of ``free`` too, whose new entries are anything, are left aside.
    """
    moves: dict[Node, Relation] = {}
    picked: dict[Dim, tuple[int, ...]] = {}
    for node, axes in table.values.items():
        dims = axes if isinstance(axes, list) and all(isinstance(dim, Dim) for dim in axes) else []
        atoms = [{atom.root() for atom in dim.atoms()} for dim in dims]
        if not any(own & known.keys() for own in atoms) or any(own & set(free) for own in atoms):
            continue
        moved = [(i, dim.root()) for i, dim in enumerate(dims) if atoms[i] & known.keys()]
        picked.update((dim, tuple(vector_of(dim, known))) for _, dim in moved if dim not in picked)
        links = tuple(Picked(i, picked[dim]) for i, dim in moved)
        moves[node] = Chain(links) if len(links) > 1 else links[0]
    edit.move(list(moves), "other entries along it", moves)


def along(table: Table, chosen: Mapping[Dim, Vector]) -> dict[str, list[Place]]:
    """All places of each tensor that lies along one of some atoms, by the tensor's name."""
    found: dict[str, list[Place]] = {}
    for place in table.places:
        found.setdefault(place.path, []).append(place)
    return {name: places for name, places in found.items() if any(a in chosen for p in places for a in p.dim.atoms())}


def resize_numbers(edit: Editor, table: Table, chosen: Mapping[Dim, Vector]) -> None:
    """Set every number in the graph and every attribute of a layer that says the size of some atoms.

    Raises RewriteError for a dimension that cannot change, with the reason.
    """
    for dim, vector in chosen.items():
        if dim.rigid:
            raise RewriteError(f"{table.name_of(dim)} cannot change its size: {dim.rigid}")
        if "even" in dim.uses and len(vector) % 2:
            name = table.name_of(dim)
            raise RewriteError(
                f"{name} would be {len(vector)}, and what is beside it is viewed as complex numbers, which ask for an even "
                f"size: {len(vector) + 1} is"
            )
    for path in dict.fromkeys(literal.region for literal in table.literals):
        literals = [literal for literal in table.literals if literal.region == path]
        for node, argument, value in _numbers(literals, chosen):
            edit.set_literal(node, argument, value, path)
    for found in table.attributes:
        size = size_of(found.dim, chosen)
        if size != found.dim.size:
            edit.set_attribute(found.path, found.name, _placed(edit, found, size))


def _placed(edit: Editor, found: Attribute, size: int) -> object:
    """The new value of an attribute of which a size, or what is at a place, is the size of a dimension."""
    if found.place is None:
        return size
    given = getattr(attribute(edit.program.module, found.path), found.name)
    return tuple(size if place == found.place else value for place, value in enumerate(given))


def _numbers(literals: Sequence[Literal], chosen: Mapping[Dim, Vector]) -> Iterator[tuple[Node, str, Argument]]:
    """The arguments whose numbers change: each with its new value."""
    grouped: dict[tuple[Node, str], list[Literal]] = {}
    for literal in literals:
        grouped.setdefault((literal.node, literal.argument), []).append(literal)
    for (node, argument), group in grouped.items():
        given = literal_arguments(node)[argument]
        value: Any = list(given) if isinstance(given, list | tuple) else given
        for literal in group:
            number = literal.start + literal.sign * size_of(literal.dim, chosen)
            if isinstance(value, list) and literal.place is not None:
                value[literal.place] = number
            else:
                value = number
        if value != (list(given) if isinstance(given, list | tuple) else given):
            yield node, argument, value
