"""The values that flow through a program: recorded at chosen nodes, in one forward without gradients."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch.fx import Interpreter, Node

from rewrite.graph.program import Program

from .form import SeededDraws
from .variants import EXAMPLE


class Recorder:
    """Runs a program's graph on a copy of its layers (parameters shared, buffers copied) and keeps chosen values."""

    def __init__(self, program: Program, nodes: Collection[Node]) -> None:
        self.program = program
        self.names = {node.name: node for node in nodes}

    def record(self, inputs: Sequence[torch.Tensor], *, training: bool, seed: int = 0) -> dict[Node, torch.Tensor]:
        """The values of the nodes for flat graph inputs; those that a branch of the mode does not reach are left out."""
        shared = {id(p): p for p in self.program.module.parameters()}
        module = copy.deepcopy(self.program.module, shared).train(training)
        keeper = _Keeper(module, self.names)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), SeededDraws(seed):
            keeper.run(*(value.detach().clone() for value in inputs))
        return keeper.found


class Tape:
    """Values of a program on its inputs, recorded when first asked for, once for each input and mode.

    The example is recorded at ``nodes``, all other inputs at ``probed``.
    """

    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, list[torch.Tensor]],
        nodes: Collection[Node],
        probed: Collection[Node],
        seed: int,
    ) -> None:
        self.inputs = inputs
        self.seed = seed
        self.recorders = {True: Recorder(program, nodes), False: Recorder(program, probed)}
        self._known: dict[tuple[str, bool], Mapping[Node, torch.Tensor] | None] = {}

    def values(self, nodes: Sequence[Node], name: str, *, training: bool) -> list[torch.Tensor] | None:
        """The values of some nodes on some inputs; None where the program does not run on them."""
        key = (name, training)
        if key not in self._known:
            self._known[key] = self._record(name, training=training)
        found = self._known[key]
        return None if found is None else [found[node] for node in nodes]

    def _record(self, name: str, *, training: bool) -> Mapping[Node, torch.Tensor] | None:
        try:
            return self.recorders[name == EXAMPLE].record(self.inputs[name], training=training, seed=self.seed)
        except Exception:
            if name == EXAMPLE and not training:
                raise
            return None


class _Keeper(Interpreter):
    def __init__(self, module: torch.nn.Module, names: dict[str, Node]) -> None:
        super().__init__(module, garbage_collect_values=True, graph=module.graph)  # type: ignore[arg-type]
        self.names = names
        self.found: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> object:
        value: object = super().run_node(n)
        if n.name in self.names and isinstance(value, torch.Tensor):
            self.found[self.names[n.name]] = value.detach().clone()
        return value
