"""A program run node by node, with its gradients, so that values inside it can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node

from rewrite.graph.program import Program


class Watching(Interpreter):
    """Runs a program's graph in evaluation: its outputs, and the values of the nodes that are watched, in their order."""

    def __init__(self, program: Program, nodes: Iterable[Node]) -> None:
        super().__init__(program.module, garbage_collect_values=True, graph=program.graph)
        self.nodes = tuple(nodes)
        self._seen: dict[Node, torch.Tensor] = {}
        self._last: Node | None = None

    def values(self, inputs: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        """The flat outputs and the values watched."""
        self._seen.clear()
        outputs = self.run(*inputs)
        return list(outputs), [self._seen[node] for node in self.nodes]

    def upto(self, inputs: Sequence[Any], last: Node) -> list[torch.Tensor]:
        """The values watched, run no further than a node."""
        self._seen.clear()
        self._last = last
        try:
            self.run(*inputs)
        except _EnoughError:
            pass
        finally:
            self._last = None
        return [self._seen[node] for node in self.nodes]

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self._seen[n] = value
        if n is self._last:
            raise _EnoughError
        return value


class _EnoughError(Exception):
    """All that is wanted was computed."""
