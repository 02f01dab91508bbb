"""A change of a program, as the journal of its edits keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .maps import ParameterMap
from .relation import Relation

Kind = Literal[
    "replace layer",
    "replace module",
    "insert",
    "remove",
    "rewire",
    "repoint",
    "set parameter",
    "set attribute",
    "set literal",
    "set property",
    "sweep",
    "untie",
    "move",
    "renumber",
]


@dataclass(frozen=True)
class Change:
    """One change of a program: what was done, to which node and path, and the layer that stood there before.

    ``nodes`` are the names of all nodes that it touched: the calls of a replaced layer, the users that were rewired.
    ``map`` says how a parameter that was set follows from those before the pass, ``relations`` how values that were moved
    follow, by node. ``names`` maps the paths of modules that
    were renumbered to their new ones, in which all other changes speak.
    """

    kind: Kind
    path: str
    node: str
    detail: str
    old: nn.Module | None = None
    new: nn.Module | None = None
    nodes: tuple[str, ...] = ()
    map: ParameterMap | None = None
    names: tuple[tuple[str, str], ...] = ()
    relations: Mapping[str, Relation] = field(default_factory=dict)
