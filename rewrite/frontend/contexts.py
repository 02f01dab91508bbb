"""Blocks of autocast and no_grad in a traced graph become regions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.carve import carve, free_inputs, replace_with_call, used_outside
from rewrite.graph.layers import AutogradFunction
from rewrite.graph.regions import Region

from .calls import LeafCall, LeafInRegionError
from .functions import call_layer


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
    for node in list(body.nodes):
        node.meta.pop("contexts", None)
        call = node.meta.get("call")
        if isinstance(call, LeafCall):
            raise LeafInRegionError(call.path)
        if call is not None:
            call_layer(body, node, place([node], call.function.__name__, AutogradFunction(call)))
    return body


def _autocast_reason(settings: tuple[Any, ...]) -> str:
    _, dtype, enabled, _ = settings
    return f"runs under autocast to {dtype}" if enabled else "runs with autocast switched off"


@dataclass(frozen=True)
class ContextUse:
    """One entered ``torch.set_grad_enabled`` or ``torch.autocast`` block; ``serial`` tells two blocks apart."""

    kind: str
    settings: tuple[Any, ...]
    serial: int
