"""Who uses what: the calls of each layer, the names that share a tensor, the nodes that read it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import attribute, gives_kind_alone
from rewrite.graph.program import Program
from rewrite.graph.tree import names_of_tensors


class Uses:
    """An index over one state of a program; make a new one after an edit. Linear in the graph and the parameters."""

    def __init__(self, program: Program) -> None:
        self._module = program.module
        self._calls: dict[str, list[Node]] = {}
        self._names: Mapping[int, list[str]] = names_of_tensors(program.module)
        self._fetched: dict[int, list[Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_module":
                self._calls.setdefault(str(node.target), []).append(node)
            elif node.op == "get_attr" and not gives_kind_alone(node):
                found = attribute(program.module, str(node.target))
                self._fetched.setdefault(id(found), []).append(node)

    def calls(self, path: str) -> list[Node]:
        """The nodes that call the layer at ``path``."""
        return self._calls.get(path, [])

    def names(self, tensor: torch.Tensor) -> list[str]:
        """Every name of a parameter or buffer, its first one first; a tied one has several."""
        return self._names.get(id(tensor), [])

    def nodes(self, tensor: torch.Tensor) -> list[Node]:
        """The nodes that read a parameter or buffer: by themselves, or the calls of layers that hold it."""
        found = dict.fromkeys(self._fetched.get(id(tensor), []))
        for name in self.names(tensor):
            found.update(dict.fromkeys(node for holder in _holders(name) for node in self.calls(holder)))
        return list(found)

    def alone(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has one name and one node that reads it."""
        return len(self.names(tensor)) == 1 and len(self.nodes(tensor)) == 1

    def layer(self, node: Node) -> nn.Module | None:
        """The layer that a node calls, None where it calls none."""
        found = attribute(self._module, str(node.target)) if node.op == "call_module" else None
        return found if isinstance(found, nn.Module) else None


def _holders(name: str) -> list[str]:
    """The paths above a parameter's name: its own module's, and those around it, which may be called as one layer."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
