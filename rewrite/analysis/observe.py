"""Values that flow through a program on data: shown to reducers as they are computed, so that none has to be kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.fx import Interpreter, Node

from rewrite.errors import RewriteError, named_line
from rewrite.graph.program import Program
from rewrite.graph.tree import on_meta
from rewrite.numerics.guard import ReadOnly, WrittenInPlaceError, sharing
from rewrite.numerics.randomness import seeded
from rewrite.numerics.running import Moments, Reducer
from rewrite.sources.data import BATCH, Call, Data, fitted
from rewrite.torch_private import pytree

R = TypeVar("R", bound=Reducer)
Watched = Node | tuple[Node, ...]
"""A node, or several whose values of one call belong together."""
Progress = Callable[[int, int | None], None]
"""Told how many items of the data were run, of how many where that is known."""


def observe(
    program: Program,
    nodes: Iterable[Watched] | Mapping[Watched, R],
    data: Any,
    *,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
    axis: int | None = None,
) -> dict[Watched, Any]:
    """Run a program on data once, and show the values of chosen nodes to a reducer each: the reducers by their nodes.

    ``nodes`` maps a node, or a tuple of nodes, to the reducer whose ``update`` is given their values; nodes alone get
    ``Moments`` of all their numbers, or along ``axis``. ``data`` is what ``Data.of`` takes. The program runs in evaluation,
    without gradients, as far as the last of the nodes; memory does not grow with the data. Parameters, buffers, data and
    the random state stay as they were.

    Raises RewriteError for data that is empty or does not fit the program, and for a program on the meta device.
    """
    chosen = nodes if isinstance(nodes, Mapping) else {node: Moments(axis) for node in nodes}
    _run(program, chosen, data, lambda viewer, call, number: viewer.show(call, number, seed), progress, seed)
    return dict(chosen)


Seen = Callable[[int, Mapping[Node, torch.Tensor], Mapping[Node, torch.Tensor]], None]


def replay(
    program: Program,
    nodes: Iterable[Node],
    data: Any,
    instead: Sequence[tuple[Node, Node]],
    seen: Seen,
    *,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
) -> None:
    """Run a program on data, and once more for each pair (node, earlier node): with the earlier one's value for the node.

    ``seen`` is told the number of the pair, the values of ``nodes`` as they are, and those with the pair. All else is as in
    ``observe``.
    """
    kept: dict[Node, torch.Tensor] = {}
    watched = {node: _Kept(node, kept) for node in dict.fromkeys([*nodes, *(earlier for _, earlier in instead)])}

    def shown(viewer: _Viewer, call: Call, number: int) -> None:
        viewer.show(call, number, seed)
        base = dict(kept)
        for i, pair in enumerate(instead):
            viewer.instead = pair
            viewer.show(call, number, seed)
            seen(i, base, dict(kept))
        viewer.instead = None

    _run(program, watched, data, shown, progress, seed)


class _Kept:
    """Keeps the last value of a node."""

    def __init__(self, node: Node, kept: dict[Node, torch.Tensor]) -> None:
        self.node, self.kept = node, kept

    def update(self, *values: torch.Tensor) -> None:
        self.kept[self.node] = values[0].clone()


def _run(
    program: Program,
    watched: Mapping[Any, Reducer],
    data: Any,
    show: Callable[[_Viewer, Call, int], None],
    progress: Progress,
    seed: int,
) -> None:
    """Show every call of the data."""
    calls = Data.of(data)
    if on_meta(program.module):
        raise RewriteError("the program is on the meta device: there are no values to observe")
    module = copy.deepcopy(program.module, sharing(program.module)).eval()
    viewer = _Viewer(program, module, watched)
    done, total = 0, calls.count()
    with ReadOnly(program.module.parameters()), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for call in calls.calls(_batch(program)):
            if not _is_rest(program, call):
                show(viewer, call, done)
            done += 1
            progress(done, total)
    if not done:
        raise RewriteError("the data is empty")


class _Viewer(Interpreter):
    """Runs a copy of a program node by node, as far as the last node that is watched."""

    def __init__(self, program: Program, module: torch.nn.Module, watched: Mapping[Watched, Reducer]) -> None:
        super().__init__(module, garbage_collect_values=True, graph=program.graph)
        self.program = program
        self.waiting: dict[Node, list[tuple[tuple[Node, ...], Reducer]]] = {}
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        for key, reducer in watched.items():
            group = key if isinstance(key, tuple) else (key,)
            self.waiting.setdefault(max(group, key=order.__getitem__), []).append((group, reducer))
        self.kept = {node for groups in self.waiting.values() for group, _ in groups for node in group}
        self.last = max(self.waiting, key=order.__getitem__, default=None)
        self.values: dict[Node, torch.Tensor] = {}
        self.instead: tuple[Node, Node] | None = None

    def show(self, call: Call, number: int, seed: int) -> None:
        """One run, its values shown."""
        self.values.clear()
        try:
            with torch.no_grad(), seeded(self.module, seed):
                self.run(*inputs_of(self.program, call, home(self.module)))
        except _EnoughError:
            pass
        except WrittenInPlaceError as error:
            raise RewriteError(f"the model writes into its own parameters when it runs: {error}") from None
        except (RewriteError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise RewriteError(f"the model does not run on item {number} of the data: {named_line(error)}") from error

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.instead is not None and n is self.instead[0]:
            value = self.values[self.instead[1]].clone()
        if n in self.kept:
            self.values[n] = value
        for group, reducer in self.waiting.get(n, ()):
            reducer.update(*(self.values[node] for node in group))
        if n in self.kept:
            self.values[n] = value.clone()  # what is written into it later does not count
        if n is self.last:
            raise _EnoughError
        return value


class _EnoughError(Exception):
    """All that is watched was seen."""


def inputs_of(program: Program, call: Call, device: torch.device) -> list[Any]:
    """The flat graph inputs of a call: copies on a device, of the dtypes that the program was captured with."""
    interface = program.module.interface
    call = fitted(call, [argument.name for argument in interface.arguments if None not in argument.leaves])
    example = interface.bind(program.example_args, program.example_kwargs)
    flat = interface.bind(*pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (call.args, dict(call.kwargs))))
    return [_like(value, given) for value, given in zip(flat, example, strict=True)]


def data_or_examples(program: Program, data: Data | None) -> Data:
    """The data of a run, or the one call that the program was captured with."""
    return Data.of([(program.example_args, dict(program.example_kwargs))]) if data is None else data


def first_inputs(program: Program, data: Data | None) -> list[Any]:
    """The flat graph inputs of the data's first call, the example inputs without data.

    Raises RewriteError for data that is empty or does not fit.
    """
    if data is None:
        return list(program.module.interface.bind(program.example_args, program.example_kwargs))
    call = next(iter(whole_calls(program, data)), None)
    if call is None:
        raise RewriteError("the data is empty")
    try:
        return inputs_of(program, call, home(program.module))
    except (TypeError, ValueError) as error:
        raise RewriteError(f"the model does not run on item 0 of the data: {named_line(error)}") from error


def home(module: torch.nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next((t.device for t in module.parameters()), torch.device("cpu"))


def whole_calls(program: Program, data: Data, batch: int = BATCH) -> Iterator[Call]:
    """The calls of the data, without a rest of fewer samples than the batch that the capture fixed."""
    yield from (call for call in data.calls(_fixed_batch(program) or batch) if not _is_rest(program, call))


def _like(value: Any, example: Any) -> Any:
    """A copy of an input; a floating one in the dtype of the example."""
    if not isinstance(value, torch.Tensor):
        return value
    cast = isinstance(example, torch.Tensor) and value.is_floating_point() and example.is_floating_point()
    return value.detach().to(example.dtype if cast else value.dtype, copy=True)


def _fixed_batch(program: Program) -> int | None:
    """The batch size that the capture fixed, None where it is dynamic."""
    shapes = program.module.interface.shapes
    return shapes[0][0] if shapes and shapes[0] else None


def _batch(program: Program) -> int:
    return _fixed_batch(program) or BATCH


def _is_rest(program: Program, call: Call) -> bool:
    """Whether a call holds the rest of the samples, fewer than the batch that the capture fixed."""
    fixed = _fixed_batch(program)
    first = next((t for t in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(t, torch.Tensor)), None)
    return fixed is not None and first is not None and first.dim() > 0 and first.shape[0] < fixed and fixed > 1
