"""What every edit stands on: the program with its journal, and the places of its module tree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.errors import RewriteError

from . import meta
from .calls import Calls
from .change import Change, Kind
from .fakes import fake_value
from .maps import ParameterMap
from .nodes import attribute
from .program import Container, Program
from .relation import Relation
from .tree import Places


class Journal:
    """A program that one pass changes, what was changed so far, and where things stand in it."""

    def __init__(self, program: Program, author: str) -> None:
        self.program = program
        self.author = author
        self.changes: list[Change] = []
        self.graph = program.graph
        self._places = Places(program.module)
        self._calls = Calls(program.graph)
        self._numbers: Counter[str] = Counter()
        self._maps: dict[str, ParameterMap] = {}
        self._readers: dict[Node, None] = {}
        self._gone: dict[str, None] = {}
        self._came: set[str] = set()
        self._reshaped: set[Node] = set()
        self._seen = 0
        self._edited: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()

    def value_of(self, node: Node) -> Any:
        """The FakeTensor value of a node, computed from those of its inputs."""
        return fake_value(self.program.module, node, known=self.program.module.shapes)

    def place(self, path: str) -> tuple[int, ...]:
        """How many modules stand before each part of a path, among those beside it: the order of the state_dict."""
        holder, places = self.program.module, []
        for part in path.split("."):
            places.append(list(holder._modules).index(part))
            holder = holder._modules[part]  # type: ignore[assignment]
        return tuple(places)

    def _note(
        self,
        kind: Kind,
        path: str,
        node: str,
        detail: str,
        nodes: tuple[str, ...] = (),
        old: nn.Module | None = None,
        new: nn.Module | None = None,
        map: ParameterMap | None = None,
        relations: Mapping[str, Relation] | None = None,
    ) -> None:
        self.changes.append(Change(kind, path, node, detail, old, new, nodes, map, relations=relations or {}))

    def _sign(self, node: Node, sources: Sequence[Node]) -> None:
        mark: meta.Mark = {"pass": self.author, "from": tuple(s.name for s in sources)}
        meta.PROVENANCE.set(node, (*meta.PROVENANCE.of(node), mark))

    def _tensor(self, path: str) -> torch.Tensor:
        replaced = ((c.path, c.old) for c in self.changes if c.old is not None and path.startswith(f"{c.path}."))
        held = (attribute(old, path.removeprefix(f"{own}.")) for own, old in replaced)
        for found in itertools.chain([attribute(self.program.module, path)], held):  # or one that a replaced layer held
            if isinstance(found, torch.Tensor):
                return found
        raise RewriteError(f"there is no parameter or buffer {path}")

    def _beside(self, path: str) -> str:
        while True:
            self._numbers[path] += 1
            beside = f"{path}_{self._numbers[path]}"
            if not self._exists(beside):
                return beside

    def _free(self, path: str) -> str:
        if self._exists(path):
            raise RewriteError(f"there is a module at {path} already")
        return path

    def _exists(self, path: str) -> bool:
        holder, name = self._parent(path)
        return holder is not None and hasattr(holder, name)

    def _parent(self, path: str) -> tuple[Any, str]:
        """What holds a path (None if nothing does), and the name there."""
        parent, _, name = path.rpartition(".")
        return attribute(self.program.module, parent) if parent else self.program.module, name

    def _put(self, path: str, layer: nn.Module, places: Sequence[int] = ()) -> None:
        holder: nn.Module = self.program.module
        *parents, name = path.split(".")
        for depth, part in enumerate(parents):
            if part not in holder._modules:
                self._places.put(holder, part, Container().train(holder.training))
                _move_last(holder._modules, places[depth : depth + 1])
            found = holder._modules[part]
            assert found is not None
            holder = found
        self._places.put(holder, name, layer)
        _move_last(holder._modules, places[len(parents) :])


def _move_last(held: dict[str, Any], place: Sequence[int]) -> None:
    """Move the last entry to a place further up, if one is given."""
    for name in list(held)[place[0] : -1] if place else ():
        held[name] = held.pop(name)
