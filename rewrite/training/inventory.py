"""What a step of training keeps, storage by storage, in the order in which hooks on saved tensors see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, Interpreter, Node
from torch.multiprocessing.reductions import StorageWeakRef

from rewrite.graph.nodes import attribute, module_path
from rewrite.graph.program import LayerGraph, Program
from rewrite.graph.properties import Runner, Running, executed, under
from rewrite.graph.regions import Region
from rewrite.numerics.compare import on_copy
from rewrite.numerics.randomness import seeded
from rewrite.torch_private import pytree

from .chain import unlinked
from .groups import as_pair
from .packer import Storages, flat_storage


@dataclass(frozen=True)
class Item:
    """One storage that is kept: by the node ``keeper`` first, made by the layer at ``maker`` (``inner``: inside of it).

    ``key`` tells it from others in another run: who keeps it, and the how manieth it is there. ``is_rounded`` storages are
    what compression rounds, a ``is_mask`` has two numbers at most.
    """

    key: tuple[str, int]
    path: str
    keeper: str
    bytes: int
    numbers: int
    is_rounded: bool
    is_mask: bool
    maker: str = ""
    is_inner: bool = False
    dtype: str = ""

    @property
    def obstacle(self) -> str:
        """Why it cannot be compressed, whatever its size; empty where it can."""
        return "" if self.is_rounded or self.is_mask else f"{self.dtype} is not compressed"


def inventory(program: Program, seed: int = 0) -> list[Item]:
    """The storages that autograd keeps of one forward in training, under the property ``recompute`` alone."""

    def action(module: Any) -> list[Item]:
        assert isinstance(module, LayerGraph)
        inputs = module.interface.bind(program.example_args, program.example_kwargs)
        inputs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
        properties = {name: value for name, value in module.properties.items() if name == "recompute"}
        taker = _Taker(module, Storages.of(module, [t for t in inputs if isinstance(t, torch.Tensor)]))
        run = under(executed(module.graph, taker.running(), properties), properties)
        with seeded(module.train(), seed), torch.enable_grad(), saved_tensors_hooks(taker.pack, lambda kept: kept):
            taker.held.append(run(module, *inputs))
        taker.held.clear()  # the hooks hold the taker, and the results what was kept with the hooks
        return taker.items

    return on_copy(program.module, action)


@dataclass
class _Taker:
    """Notes each storage once; ``held`` keeps addresses from being given away twice."""

    module: LayerGraph
    storages: Storages
    items: list[Item] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    node: str = ""
    path: str = ""
    known: set[tuple[int, int, torch.dtype]] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    makers: dict[int, tuple[StorageWeakRef, str]] = field(default_factory=dict)
    region: str = ""
    given: frozenset[int] = frozenset()

    def running(self) -> Running:
        """Runs graphs node by node."""

        def made(graph: Graph) -> Runner:
            return lambda _, *inputs: _Walker(self, graph).run(*inputs)

        def begin(path: str) -> None:
            self.node, self.path = f"region {path}", path

        return Running(made, begin)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        key = self.storages.key(tensor) or (address, tensor._version, tensor.dtype)
        if key not in self.known and address not in self.storages.owned:
            self.known.add(key)
            flat = flat_storage(tensor)
            self.held.append(flat)
            numeric = flat.is_floating_point() or flat.dtype is torch.bool
            is_mask = numeric and as_pair(flat.view(torch.uint8) if flat.dtype is torch.bool else flat) is not None
            inner = bool(self.region) and address not in self.given
            maker = self.region if inner else self._maker(address)
            name = (self.node, self.counts[self.node])
            self.counts[self.node] += 1
            is_rounded = flat.is_floating_point() and not is_mask
            dtype = str(flat.dtype).removeprefix("torch.")
            self.items.append(
                Item(name, self.path, self.node, flat.nbytes, flat.numel(), is_rounded, is_mask, maker, inner, dtype)
            )
        return unlinked(tensor)

    def _maker(self, address: int) -> str:
        """The layer that made what lies at an address; what it made may be gone, and its place taken."""
        reference, path = self.makers.get(address, (None, ""))
        return "" if reference is None or reference.expired() else path


class _Walker(Interpreter):
    """Runs nodes, and tells the taker whose turn it is and what layers make."""

    def __init__(self, taker: _Taker, graph: Graph) -> None:
        super().__init__(taker.module, garbage_collect_values=True, graph=graph)
        self.taker = taker

    def run_node(self, n: Node) -> Any:
        taker = self.taker
        taker.node, taker.path = n.name, str(n.target) if n.op == "call_module" else module_path(n)
        layer = attribute(taker.module, str(n.target)) if n.op == "call_module" else None
        taker.region = str(n.target) if isinstance(layer, Region) else ""
        if taker.region:
            given = [self.env[source] for source in n.all_input_nodes]
            taker.given = frozenset(t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor))
        found = super().run_node(n)
        taker.region = ""
        if layer is not None and isinstance(found, torch.Tensor):
            storage = found.untyped_storage()
            taker.makers[storage.data_ptr()] = (StorageWeakRef(storage), str(n.target))
        return found


def by_key(items: list[Item], chosen: Mapping[tuple[str, int], int]) -> list[int]:
    """For each rounded item in order what was chosen for it, 0 where nothing was."""
    return [chosen.get(item.key, 0) for item in items if item.is_rounded]
