"""The table of a program's dimensions: each with a readable name, its uses, and every place that lies along it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.streams import Stream, streams
from rewrite.graph.program import Program

from .call import Attribute, Literal, Notes, Place, Score
from .dims import Dim, written


@dataclass(frozen=True)
class Table:
    """The dimensions of a program.

    ``named`` are the atoms that reach a parameter, by name; ``places`` the axes of parameters and buffers, ``literals``
    and ``attributes`` the numbers that say a size; ``values`` the dimensions of each node's value. ``unknown`` are the
    operators and layers that no rule is known for, ``scores`` the products of queries and keys.
    """

    named: Mapping[str, Dim]
    places: tuple[Place, ...]
    literals: tuple[Literal, ...]
    attributes: tuple[Attribute, ...]
    values: Mapping[Node, Any]
    unknown: tuple[str, ...]
    scores: tuple[Score, ...] = ()

    def __post_init__(self) -> None:
        names = {dim: name for name, dim in self.named.items() if not (dim.rigid and name.startswith("dim."))}
        object.__setattr__(self, "_names", names)
        along: dict[Dim, list[Place]] = {}
        for place in self.places:
            for atom in place.dim.atoms():
                along.setdefault(atom, []).append(place)
        object.__setattr__(self, "_along", along)

    def places_of(self, dim: Dim) -> list[Place]:
        """The axes of parameters and buffers that lie along a dimension, or one of whose factors or parts it is."""
        along: Mapping[Dim, list[Place]] = self._along  # type: ignore[attr-defined]
        return [place for atom in dim.atoms() for place in along.get(atom, ())]

    def roles_of(self, dim: Dim) -> dict[tuple[str, int], set[str]]:
        """What each axis of a tensor that lies along a dimension does there, by (path, axis)."""
        roles: dict[tuple[str, int], set[str]] = {}
        for place in self.places_of(dim):
            roles.setdefault((place.path, place.axis), set()).add(place.role)
        return roles

    def name_of(self, dim: Dim) -> str:
        """A dimension in words: `ffn.0`, `heads.0 x head_dim.0`, `(q + k)`."""
        return written(dim, self._names)  # type: ignore[attr-defined]

    @property
    def resizable(self) -> dict[str, Dim]:
        """The dimensions whose size can be changed."""
        return {name: dim for name, dim in self.named.items() if not dim.rigid and dim.size > 1}

    def to_json(self) -> dict[str, Any]:
        """Plain values: each dimension with its size, uses, reason not to change, and places."""
        return {
            "dimensions": [
                {
                    "name": name,
                    "size": dim.size,
                    "rigid": dim.rigid,
                    "uses": sorted(dim.uses),
                    "places": [
                        {"path": p.path, "axis": p.axis, "role": p.role, "is": self.name_of(p.dim)}
                        for p in dict.fromkeys(self.places_of(dim))
                    ],
                }
                for name, dim in self.named.items()
            ],
            "unknown": list(self.unknown),
        }


def tabulated(program: Program, notes: Notes, values: Mapping[Node, Any]) -> Table:
    """The table of what a walk gathered."""
    names: dict[Dim, str] = {}
    for dim, name in itertools.chain(_by_structure(program, notes, values), _by_place(program, notes)):
        if dim.size > 1:
            names.setdefault(dim.root(), name)
    order = {dim: i for i, dim in enumerate(names)}
    found: dict[str, Dim] = {}
    for dim in sorted(names, key=order.__getitem__):
        found[_free(names[dim], found)] = dim
    places = tuple(dict.fromkeys(notes.places))
    return Table(
        found, places, tuple(notes.literals), tuple(notes.attributes), values, tuple(notes.unknown), tuple(notes.scores)
    )


def _free(name: str, taken: Mapping[str, Dim]) -> str:
    if name not in taken:
        return name
    return next(n for i in itertools.count(1) if (n := f"{name}.{i}") not in taken)


def _by_structure(program: Program, notes: Notes, values: Mapping[Node, Any]) -> Iterator[tuple[Dim, str]]:
    """What the streams and branches tell: hidden sizes, FFNs, heads."""
    flows = streams(program)
    found = branches(program, flows)
    learned = {id(branch.stream) for branch in found if branch.parts.projections or branch.parts.spatial}
    for stream in flows:  # an activation that adds to its own input is none
        if not learned or id(stream) in learned:
            yield from _hidden(stream, values)
    for branch in found:
        if branch.kind in ("attention", "cross-attention"):
            yield from _heads(branch, values)
        elif branch.kind in ("ffn", "gated ffn"):
            yield from _ffn(branch, values)


def _hidden(stream: Stream, values: Mapping[Node, Any]) -> Iterator[tuple[Dim, str]]:
    for node, axis in stream.values.items():
        axes = values.get(node)
        if isinstance(axes, list) and len(axes) > axis and isinstance(axes[axis], Dim):  # not the parts of a split
            yield from ((atom, "hidden") for atom in axes[axis].atoms())
            return


def _ffn(branch: Branch, values: Mapping[Node, Any]) -> Iterator[tuple[Dim, str]]:
    for node in branch.parts.first:
        for dim in _last(values.get(node)):
            for atom in dim.atoms():
                yield atom, f"ffn.{branch.layer}"


def _heads(branch: Branch, values: Mapping[Node, Any]) -> Iterator[tuple[Dim, str]]:
    """A projection's output as heads x head_dim; where query heads share a key head, as kv_heads x group x head_dim."""
    for node in branch.parts.first:
        for dim in _last(values.get(node)):
            for segment in dim.segments():
                yield from _head_factors(segment, branch.layer)


def _head_factors(segment: Dim, layer: int) -> Iterator[tuple[Dim, str]]:
    *lead, last = segment.factors()
    if not lead:
        return
    kind = "head_dim" if any("score" in atom.uses for atom in last.atoms()) else "value_dim"
    for atom in last.atoms():
        yield atom, f"{kind}.{layer}"
    heads = list(dict.fromkeys(a for f in lead for a in f.atoms() if "batch" in a.uses and a.size > 1))
    names = {1: ("heads",), 2: ("kv_heads", "group")}.get(len(heads), ())
    for atom, name in zip(heads, names, strict=False):
        yield atom, f"{name}.{layer}"


def _last(axes: Any) -> list[Dim]:
    return [axes[-1]] if isinstance(axes, list) and axes and isinstance(axes[-1], Dim) else []


def _by_place(program: Program, notes: Notes) -> Iterator[tuple[Dim, str]]:
    """What is left: vocabularies and positions by their tables, channels of convolutions, experts and their units, all
    others by number.
    """
    channels, others = itertools.count(), itertools.count()
    stacked = {place.path for place in notes.places if place.role == "expert"}
    for place in notes.places:
        layer = _layer_of(program, place.path)
        convolution = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for atom in place.dim.atoms():
            if place.role == "rows":
                yield atom, "vocab" if "index" in atom.uses and atom.size > 0 and not atom.rigid else "rows"
            elif convolution and place.role == "out":
                yield atom, f"channels.{next(channels)}"
            elif place.path in stacked:
                yield atom, f"{'experts' if 'expert' in atom.uses else 'ffn'}.{_number_in(place.path)}"
            else:
                yield atom, f"dim.{next(others)}"


def _number_in(path: str) -> str:
    """The number of the layer that a path lies in: 3 for `layers.3.mlp.experts`."""
    return next((part for part in path.split(".") if part.isdigit()), "0")


def _layer_of(program: Program, path: str) -> nn.Module | None:
    try:
        return program.module.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None
