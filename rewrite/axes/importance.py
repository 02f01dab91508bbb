"""How much each entry of a dimension matters, by the weights along it."""

from __future__ import annotations

import torch

from rewrite.graph.nodes import attribute
from rewrite.graph.program import Program

from .dims import Dim, vector_of
from .table import Table

_MATRIX = 2


def importance(program: Program, table: Table, dim: Dim) -> torch.Tensor:
    """For each entry i the product, over all matrices along the dimension, of the norm of what is i's in them: for an FFN
    ‖(W1)_i‖ ‖(W2)_:,i‖, with a gate's row as a factor too. In float64; ones on the meta device.
    """
    found = torch.ones(dim.size, dtype=torch.float64)
    for place in dict.fromkeys(table.places_of(dim)):
        tensor = attribute(program.module, place.path)
        if place.role not in ("in", "out") or not isinstance(tensor, torch.Tensor) or tensor.dim() < _MATRIX:
            continue
        if tensor.is_meta:
            return torch.ones(dim.size, dtype=torch.float64)
        others = [axis for axis in range(tensor.dim()) if axis != place.axis]
        norms = tensor.detach().double().square().sum(others).sqrt().cpu()
        found *= norms if place.dim.root() is dim.root() else _gathered(norms, place.dim, dim)
    return found


def _gathered(norms: torch.Tensor, along: Dim, dim: Dim) -> torch.Tensor:
    """For each entry of an atom the product over the entries that are its own in an axis of several parts or factors."""
    rest = set(vector_of(along, {dim.root(): []}))
    own = ([e for e in vector_of(along, {dim.root(): [i]}) if e not in rest] for i in range(dim.size))
    return torch.stack([norms[entries].prod() for entries in own])
