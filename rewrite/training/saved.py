"""What autograd keeps for the backward of a program: measured, by unique storage, per layer and kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule, Interpreter, Node

from rewrite.errors import RewriteError
from rewrite.frontend.capture import capture
from rewrite.graph.layers import Constants
from rewrite.graph.nodes import attribute, module_path, packet
from rewrite.graph.program import LayerGraph, Program
from rewrite.graph.properties import Runner, Running, executed, under
from rewrite.graph.tree import on_meta
from rewrite.numerics.compare import on_copy
from rewrite.numerics.randomness import seeded
from rewrite.torch_private import compiled_saved, is_traced, pytree

from .chain import unlinked

BACKENDS = ("eager", "inductor")


@dataclass(frozen=True)
class Kept:
    """What one layer, or one operator outside of layers, keeps: the module path, its kind, dtype, tensors and bytes.

    A storage that several need counts for the first of them, in execution order.
    """

    path: str
    kind: str
    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """The bytes that autograd keeps after one forward in training, without parameters, buffers and inputs."""

    backend: str
    kept: tuple[Kept, ...]

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(each.bytes for each in self.kept)

    def by_kind(self) -> dict[str, int]:
        """Bytes by kind of layer or operator, the largest first."""
        return _summed(self.kept, lambda each: each.kind)

    def by_path(self) -> dict[str, int]:
        """Bytes by module path, the largest first."""
        return _summed(self.kept, lambda each: each.path)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {"backend": self.backend, "bytes": self.bytes, "kept": [asdict(each) for each in self.kept]}

    def __str__(self) -> str:
        width = max([len(kind) for kind in self.by_kind()] + [5])
        rows = [*self.by_kind().items(), ("total", self.bytes)]
        return "\n".join(f"{kind:{width}} {count:>15,}" for kind, count in rows)


def memory(
    model: Program | nn.Module,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str = "eager",
    seed: int = 0,
) -> Memory:
    """Measure what autograd keeps after one forward of a program (or a module, which is captured first) in training.

    Counted are the bytes of unique storages, those that parameters, buffers and inputs own left aside; under the program's
    properties, what these keep in place of it. ``backend`` is ``eager``, or ``inductor`` for the program compiled as one,
    whose tensors have no layer any more. Without ``args`` and ``kwargs`` the example inputs of a program are used.

    Raises RewriteError for another backend, and for a program on the meta device.
    """
    if backend not in BACKENDS:
        raise RewriteError(f"memory is measured for {' or '.join(BACKENDS)}, not {backend!r}")
    program = model if isinstance(model, Program) else capture(model, args or (), kwargs)
    if on_meta(program.module):
        raise RewriteError("the program is on the meta device: there are no values to keep")
    given = (program.example_args, program.example_kwargs) if args is None and kwargs is None else (args or (), kwargs or {})
    call = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(given[0]), dict(given[1])))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        ledger = _compiled(program, call) if backend == "inductor" else _node_by_node(program, call, seed)
    return Memory(backend, tuple(ledger.kept()))


def _node_by_node(program: Program, call: tuple[Any, Any], seed: int) -> _Ledger:
    def action(module: nn.Module) -> _Ledger:
        assert isinstance(module, LayerGraph)
        ledger = _Ledger.of(module, call)
        run = under(executed(module.graph, _walking(module, ledger), module.properties), module.properties)
        with seeded(module.train(), seed), ledger.open():
            ledger.held = run(module, *module.interface.bind(*call))
        return ledger

    return on_copy(program.module, action)


def _compiled(program: Program, call: tuple[Any, Any]) -> _Ledger:
    """The first call compiles, which it can only do outside of hooks that measure; the second one is measured."""
    module = program.clone().module.train()
    run = torch.compile(module, fullgraph=not module.properties)
    run(*call[0], **call[1])
    ledger = _Ledger.of(module, call)
    ledger.place = ("", "compiled")
    with ledger.open():
        ledger.held = run(*call[0], **call[1])
    return ledger


def kept_bytes(module: LayerGraph, call: tuple[Any, Any], run: Callable[..., Any]) -> int:
    """The bytes that one forward ``run(*args, **kwargs)`` of a module leaves for its backward, in training."""
    ledger = _Ledger.of(module, call)
    with ledger.open():
        ledger.held = run(*call[0], **call[1])
    return sum(count for _, count in ledger.found.values())


def _owned(module: LayerGraph) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        if isinstance(part, Constants):
            yield from (part.__dict__[name] for name in part.names)


@dataclass
class _Ledger:
    """The storages that were kept, each with who kept it first; ``place`` is who runs now: path and kind.

    ``held`` are the results, which hold what was kept: no address is given away twice. Only the memory of one kind of
    ``device`` counts: what waits on the host is not kept on a GPU.
    """

    owned: Sequence[torch.Tensor]
    device: str = "cpu"
    place: tuple[str, str] = ("", "")
    found: dict[int, tuple[tuple[str, str, str], int]] = field(default_factory=dict)
    held: Any = None
    is_inlined: bool = False

    @classmethod
    def of(cls, module: LayerGraph, call: tuple[Any, Any]) -> _Ledger:
        """A ledger for a call: parameters, buffers and inputs are not counted."""
        owned = [*_owned(module), *(t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor))]
        return cls(owned, next((p.device.type for p in module.parameters()), "cpu"))

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Note what is kept inside: by autograd itself, or in place of that by hooks on saved tensors."""
        own = {t.untyped_storage().data_ptr() for t in self.owned}
        begin = saved_tensors_hooks.__init__
        compiled = ExitStack()

        def noting(hooks: saved_tensors_hooks, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
            if isinstance(pack, GraphModule):  # a compiler knows it by this, and puts it into its graphs
                handle = pack.register_forward_hook(
                    lambda _, args, packed: None if is_traced(*args) else self._noted(packed, own)
                )
                compiled.callback(handle.remove)
                self.is_inlined = True
                begin(hooks, pack, unpack)
            else:
                begin(hooks, lambda tensor: self._noted(pack(tensor), own), unpack)

        with compiled, mock.patch.object(saved_tensors_hooks, "__init__", noting), saved_tensors_hooks(unlinked, _same):
            yield
        if self.is_inlined:
            results = [t for t in pytree.tree_leaves(self.held) if isinstance(t, torch.Tensor)]
            self._noted([*compiled_saved(results)], own)
        self.held = None  # the hooks hold the ledger, and the results what was kept with the hooks

    def _noted(self, packed: Any, own: set[int]) -> Any:
        for tensor in pytree.tree_leaves(packed):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                dtype = str(tensor.dtype).removeprefix("torch.")
                if storage.data_ptr() not in own and tensor.device.type == self.device:
                    self.found.setdefault(storage.data_ptr(), ((*self.place, dtype), storage.nbytes()))
        return packed

    def kept(self) -> Iterator[Kept]:
        """What was kept, by who kept it, in execution order."""
        groups: dict[tuple[str, str, str], list[int]] = {}
        for who, count in self.found.values():
            groups.setdefault(who, []).append(count)
        yield from (Kept(*who, len(counts), sum(counts)) for who, counts in groups.items())


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Walker(Interpreter):
    """Runs a layer graph node by node, and tells the ledger whose turn it is."""

    def __init__(self, module: LayerGraph, ledger: _Ledger, graph: Graph) -> None:
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.ledger = ledger

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module":
            layer = attribute(self.module, str(n.target))
            self.ledger.place = (str(n.target), type(layer).__name__)
        else:
            name = str(getattr(packet(n), "__name__", "") or getattr(n.target, "__name__", n.op))
            self.ledger.place = (module_path(n), name)
        return super().run_node(n)


def _walking(module: LayerGraph, ledger: _Ledger) -> Running:
    """Graphs are run node by node; a part that is run as a whole keeps what it was given."""

    def made(graph: Graph) -> Runner:
        return lambda _, *inputs: _Walker(module, ledger, graph).run(*inputs)

    def begin(path: str) -> None:
        ledger.place = (path, "recompute")

    return Running(made, begin)


def _summed(kept: Sequence[Kept], key: Callable[[Kept], str]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for each in kept:
        sums[key(each)] = sums.get(key(each), 0) + each.bytes
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))
