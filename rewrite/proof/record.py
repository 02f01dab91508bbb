"""The values that flow through a program: recorded at chosen nodes, in one forward without gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.fx import Interpreter, Node

from rewrite.graph.program import LayerGraph, Program

from .draws import SeededDraws
from .variants import EXAMPLE


class Tape:
    """Values of a program on its inputs, recorded when first asked for, once for each input and mode.

    The example is recorded at ``nodes``, all other inputs at ``probed``. ``keep`` says anew which these are: what is known
    of them stays, the rest is dropped.
    """

    def __init__(
        self, program: Program, inputs: Mapping[str, list[torch.Tensor]], seed: int, likely: Tape | None = None
    ) -> None:
        """``likely``: values of a program with the same nodes and other weights, as good as any to hold a part at."""
        self.likely = likely
        self.program = program
        self.inputs = inputs
        self.seed = seed
        self.nodes: frozenset[Node] = frozenset()
        self.probed: frozenset[Node] = frozenset()
        self._known: dict[tuple[str, bool], dict[Node, torch.Tensor] | None] = {}

    def keep(self, nodes: Collection[Node], probed: Collection[Node] = ()) -> None:
        """Record these from now on."""
        self.nodes, self.probed = frozenset(nodes), frozenset(probed)
        for key, found in self._known.items():
            if found is not None:
                self._known[key] = {node: value for node, value in found.items() if node in self._wanted(key[0])}

    def values(self, nodes: Sequence[Node], name: str, *, training: bool) -> list[torch.Tensor] | None:
        """The values of some of the kept nodes on some inputs; None where the program does not run on them.

        Those that a branch of the mode does not reach are missing: KeyError.
        """
        key = (name, training)
        found = self._known.get(key, {})
        if found is not None and any(node not in found for node in nodes):
            more = self._likely(name, training=training)
            if more is None:
                more = self._record(name, self._wanted(name) - found.keys(), training=training)
            found = self._known[key] = None if more is None else {**found, **more}
        return None if found is None else [found[node] for node in nodes]

    def _likely(self, name: str, *, training: bool) -> dict[Node, torch.Tensor] | None:
        """The values that the other program has at nodes of the same names and kinds; None where it has not all of them."""
        if self.likely is None:
            return None
        there = {node.name: node for node in self.likely.nodes}
        pairs = [(node, there.get(node.name)) for node in self._wanted(name)]
        known = [(node, other) for node, other in pairs if other is not None and _alike(node, other)]
        if len(known) < len(pairs):
            return None
        values = self.likely.values([other for _, other in known], name, training=training)
        return None if values is None else {node: value for (node, _), value in zip(known, values, strict=True)}

    def _wanted(self, name: str) -> frozenset[Node]:
        return self.nodes if name == EXAMPLE else self.probed

    def _record(self, name: str, nodes: Collection[Node], *, training: bool) -> dict[Node, torch.Tensor] | None:
        try:
            return recorded(self.program, self.inputs[name], nodes, training=training, seed=self.seed)
        except Exception:
            if name == EXAMPLE and not training:
                raise
            return None


def _alike(a: Node, b: Node) -> bool:
    """Whether two nodes give tensors of one shape and dtype."""
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)


def recorded(
    program: Program, inputs: Sequence[torch.Tensor], nodes: Collection[Node], *, training: bool, seed: int
) -> dict[Node, torch.Tensor]:
    """The values of the nodes for flat graph inputs, on copies of the layers (parameters shared, buffers copied).

    The run ends with the last of them; where they are inputs alone it goes on to the end, since these say nothing of whether
    the program runs on them. Those that a branch of the mode does not reach are left out.
    """
    keeper = _Keeper(_layers(program.module).train(training), program, nodes)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), SeededDraws(seed), contextlib.suppress(_CompleteError):
        keeper.run(*(value.detach().clone() for value in inputs))
    return keeper.found


def _layers(module: LayerGraph) -> nn.Module:
    """The layers and tensors of a program without its graph."""
    shared = {id(p): p for p in module.parameters()}
    root = nn.Module()
    for kind in ("_parameters", "_buffers", "_modules"):
        root.__dict__[kind] = copy.deepcopy(module.__dict__[kind], shared)
    return root


class _CompleteError(Exception):
    """All values are there."""


class _Keeper(Interpreter):
    def __init__(self, root: nn.Module, program: Program, nodes: Collection[Node]) -> None:
        super().__init__(root, garbage_collect_values=True, graph=program.graph)
        self.missing = set(nodes)
        self.whole = all(node.op == "placeholder" for node in nodes)
        self.found: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> object:
        if not self.missing and not self.whole:
            raise _CompleteError
        value: object = super().run_node(n)
        if n in self.missing:
            self.missing.discard(n)
            if isinstance(value, torch.Tensor):
                self.found[n] = value.detach().clone()
        return value
