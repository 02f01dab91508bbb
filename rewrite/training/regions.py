"""Regions of a layer graph that keep their inputs alone: the graph runs in segments, some of them checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint

from rewrite.graph.carve import carve, free_inputs, used_outside
from rewrite.graph.module_calls import module_calls
from rewrite.graph.nodes import attribute, is_random
from rewrite.graph.properties import Runner, Running, uncompiled
from rewrite.numerics.randomness import draws

from .stateful import replaying


@dataclass(frozen=True)
class Segment:
    """Nodes of a graph that run in one go, as a graph of their own; ``region`` is the path that is computed again, or ""."""

    region: str
    graph: Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def segments(graph: Graph, regions: Sequence[str]) -> list[Segment]:
    """The graph cut at the calls of the modules at some paths; what lies between two nodes of a call is part of it.

    A call that lies in another, or crosses it, is part of that one.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    spans = sorted(
        (order[call.nodes[0]], order[call.nodes[-1]], path) for path in regions for call in module_calls(graph, path)
    )
    owner = ["" for _ in order]
    calls = [0 for _ in order]
    reached = -1
    for number, (first, last, path) in enumerate(spans, 1):
        if first > reached:
            for place in range(first, last + 1):
                owner[place], calls[place] = path, number
            reached = last
    made: list[tuple[int, str, list[Node]]] = []
    for node in body:
        number, path = calls[order[node]], owner[order[node]]
        if not made or made[-1][0] != number:
            made.append((number, path, []))
        made[-1][2].append(node)
    return [_segment(path, nodes) for _, path, nodes in made]


def _segment(path: str, nodes: list[Node]) -> Segment:
    outputs, inputs = used_outside(nodes), free_inputs(nodes)
    layers = tuple(dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module"))
    own = carve(nodes, outputs, inputs)
    return Segment(path, own, tuple(n.name for n in inputs), tuple(n.name for n in outputs), layers)


def segmented(graph: Graph, running: Running, value: Mapping[str, Any]) -> Runner | None:
    """What runs a layer graph with the regions of the property ``recompute`` checkpointed; None where there are none."""
    if not value["regions"]:
        return None
    parts = segments(graph, value["regions"])
    runs = [running.made(part.graph) for part in parts]
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in graph.nodes if n.op == "output")

    def forward(module: nn.Module, *inputs: Any) -> Any:
        values = dict(zip(names, inputs, strict=True))
        for part, each in zip(parts, runs, strict=True):
            given = [values[name] for name in part.inputs]
            if part.region and torch.is_grad_enabled():
                running.begin(part.region)
                found_layers = (attribute(module, path) for path in part.layers)
                within = [layer for layer in found_layers if isinstance(layer, nn.Module)]
                random = _is_random(part, within)
                found = checkpointed(each, within, random=random)(module, *given)
            else:
                found = each(module, *given)
            values.update(zip(part.outputs, (found,) if len(part.outputs) == 1 else found, strict=True))
        return torch.fx.map_arg(output.args[0], lambda n: values[n.name])

    return forward


def _is_random(part: Segment, layers: Sequence[nn.Module]) -> bool:
    """Whether a segment may draw: if not, no state of a generator is kept for it."""
    return any(is_random(node) for node in part.graph.nodes) or any(draws(x) and getattr(x, "p", 1.0) for x in layers)


def checkpointed(run: Runner, layers: Sequence[nn.Module], *, random: bool = True) -> Runner:
    """``run`` by ``torch.utils.checkpoint``; a second forward draws what the first drew, in its modes, and
    leaves buffers as they are. What it is given and changes, such as a cache of keys, it is given as it was.

    With ``random`` False nothing draws.
    """

    def again(*args: Any, **kwargs: Any) -> Any:
        modes = {part: part.training for layer in layers for part in layer.modules()}

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), _Anew(lambda: _as_it_was(layers, modes))

        rerun = replaying(run, args, kwargs)
        return checkpoint(rerun, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=random, **kwargs)

    return uncompiled(again)


@dataclass
class _Anew(AbstractContextManager[None]):
    """A context that is made anew each time it is entered: once a backward, of which there may be several."""

    make: Callable[[], AbstractContextManager[None]]
    opened: list[AbstractContextManager[None]] = field(default_factory=list)

    def __enter__(self) -> None:
        self.opened.append(self.make())
        self.opened[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.opened.pop().__exit__(*error)


@contextmanager
def _as_it_was(layers: Sequence[nn.Module], modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """In the modes of the first forward, whose buffers count."""
    now = {part: part.training for part in modes}
    try:
        for part, mode in modes.items():
            part.training = mode
        with unwritten(layers):
            yield
    finally:
        for part, mode in now.items():
            part.training = mode


@contextmanager
def unwritten(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Take back what the forward writes into buffers: statistics count each batch once."""
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
