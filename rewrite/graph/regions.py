"""Regions: layers that own a captured subgraph, and carving them out of a flat graph.

A region takes every tensor it needs, parameters included, as an argument, so that state_dict keys stay where they are.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.frontend.flatten import ContextUse

from .codegen import compile_graph, copy_graph


class Region(nn.Module):
    """A part of the model kept whole: its captured subgraph, one for each mode where the modes differ.

    ``graphs`` holds ``{"any": graph}`` or ``{"train": graph, "eval": graph}``; ``contexts`` are entered around it.
    """

    graphs: Mapping[str, Graph]

    def __init__(self, graphs: Mapping[str, Graph], reason: str, contexts: Sequence[tuple[str, tuple[Any, ...]]] = (),
                 layers: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.reason = reason
        self.contexts = tuple(contexts)
        for name, layer in (layers or {}).items():
            self.add_module(name, layer)
        self.__dict__["graphs"] = dict(graphs)
        self.recompile()

    def recompile(self) -> None:
        """Generate the callables anew from the graphs."""
        self.__dict__["runs"] = {mode: compile_graph(graph)[0] for mode, graph in self.graphs.items()}

    def forward(self, *inputs: Any) -> Any:
        runs: dict[str, Callable[..., Any]] = self.__dict__["runs"]
        run = runs["any"] if "any" in runs else runs["train" if self.training else "eval"]
        if not self.contexts:
            return run(self, *inputs)
        device = next((v.device.type for v in inputs if isinstance(v, torch.Tensor)), "cpu")
        with contextlib.ExitStack() as stack:
            for kind, settings in self.contexts:
                stack.enter_context(_enter(kind, settings, device))
            return run(self, *inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        nn.Module.__init__(made)
        for key, value in self.__dict__.items():
            if key == "graphs":
                made.__dict__[key] = {mode: copy_graph(graph) for mode, graph in value.items()}
            elif key != "runs":
                made.__dict__[key] = copy.deepcopy(value, memo)
        made.recompile()
        return made

    def extra_repr(self) -> str:
        return self.reason


def _enter(kind: str, settings: tuple[Any, ...], device: str) -> contextlib.AbstractContextManager[Any]:
    if kind == "grad":
        return torch.set_grad_enabled(settings[0])
    _, dtype, enabled, cache = settings
    if not enabled and not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()  # the meta device has no autocast, so it is off
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)


def carve(nodes: Sequence[Node], outputs: Sequence[Any], inputs: Mapping[Node, Node] | Sequence[Node],
          rename: Callable[[Node], Node] = lambda n: n) -> Graph:
    """A graph of its own from ``nodes`` (in order); ``inputs`` become its placeholders, ``outputs`` its results.

    ``rename`` maps a node that is used from outside to the input that stands for it.
    """
    made = Graph()
    values: dict[Node, Node] = {}
    for source in inputs:
        placeholder = made.placeholder(source.name)
        placeholder.meta = dict(source.meta)
        values[source] = placeholder

    def value(node: Node) -> Node:
        return values[node] if node in values else values[rename(node)]

    for node in nodes:
        values[node] = made.node_copy(node, value)
    results = torch.fx.map_arg(tuple(outputs), value)
    made.output(results[0] if len(results) == 1 else results)
    return made


def free_inputs(nodes: Sequence[Node], outputs: Sequence[Any] = ()) -> list[Node]:
    """The nodes outside of ``nodes`` that they (or ``outputs``) use, in order of first use."""
    inside = set(nodes)
    found: dict[Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside:
                found[source] = None
    for output in outputs:
        if isinstance(output, Node) and output not in inside:
            found[output] = None
    return list(found)


def used_outside(nodes: Sequence[Node]) -> list[Node]:
    """The nodes whose value is used by a node outside of ``nodes``, in order."""
    inside = set(nodes)
    return [n for n in nodes if any(user not in inside for user in n.users)]


def replace_with_call(graph: Graph, path: str, inputs: Sequence[Node], outputs: Sequence[Node | None],
                      before: Node, meta: Mapping[str, Any]) -> list[Node]:
    """Insert ``call_module path(*inputs)`` before a node; the nodes that stand for each output."""
    with graph.inserting_before(before):
        call = graph.call_module(path, tuple(inputs))
        call.meta.update(meta)
        if len(outputs) == 1:
            call.meta["val"] = outputs[0].meta.get("val") if outputs[0] is not None else None
            return [call]
        call.meta["val"] = tuple(o.meta.get("val") if o is not None else None for o in outputs)
        made = []
        for i, output in enumerate(outputs):
            item = graph.call_function(operator.getitem, (call, i))
            item.meta.update(meta)
            item.meta["val"] = output.meta.get("val") if output is not None else None
            made.append(item)
        return made


def context_blocks(graph: Graph, depth: int) -> Iterator[tuple[ContextUse, list[Node]]]:
    """The runs of nodes that share their context number ``depth``."""
    current: ContextUse | None = None
    block: list[Node] = []
    for node in list(graph.nodes):
        contexts = node.meta.get("contexts", ())
        if node.op in ("placeholder", "get_attr"):
            continue
        here = contexts[depth] if len(contexts) > depth else None
        if here is not current:
            if current is not None:
                yield current, block
            current, block = here, []
        block.append(node)


def group_contexts(graph: Graph, place: Callable[[Sequence[Node], str, nn.Module], str], depth: int = 0) -> None:
    """Turn each block of nodes in a ``no_grad`` or ``autocast`` context into a Region; ``place`` gives its path."""
    for use, block in list(context_blocks(graph, depth)):
        outputs = used_outside(block)
        inputs = free_inputs(block)
        layers: dict[str, nn.Module] = {}
        body = grouped(carve(block, outputs, inputs), layers, depth + 1)
        reason = "runs without gradient" if use.kind == "grad" else _autocast_reason(use.settings)
        name = "no_grad" if use.kind == "grad" else "autocast"
        region = Region({"any": body}, reason, [(use.kind, use.settings)], layers)
        path = place(block, name, region)
        meta = {k: v for k, v in block[0].meta.items() if k in ("nn_module_stack", "stack_trace")}
        made = replace_with_call(graph, path, inputs, outputs, block[0], meta)
        for old, new in zip(outputs, made, strict=False):
            old.replace_all_uses_with(new)
        for node in reversed(block):
            graph.erase_node(node)


def grouped(body: Graph, layers: dict[str, nn.Module], depth: int) -> Graph:
    """The graph of a region with the contexts inside it (from number ``depth`` on) grouped; they go into ``layers``."""
    def place(nodes: Sequence[Node], name: str, layer: nn.Module) -> str:
        key = f"{name}_{len(layers)}"
        layers[key] = layer
        return key

    group_contexts(body, place, depth)
    for node in body.nodes:
        node.meta.pop("contexts", None)
    return body


def _autocast_reason(settings: tuple[Any, ...]) -> str:
    _, dtype, enabled, _ = settings
    return f"runs under autocast to {dtype}" if enabled else "runs with autocast switched off"
