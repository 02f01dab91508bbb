"""Graphs as JSON and back: a list of nodes with the metadata that survives a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.errors import RewriteError
from rewrite.graph.regions import Region
from rewrite.sources.compat import import_mended
from rewrite.sources.installed import is_installed
from rewrite.torch_private import OPDEFS, OpOverload

from .values import Json, decode, encode, function_name, function_named

_META = ("nn_module_stack", "whole", "provenance", "modes", "aligned")


def operator_homes(module: nn.Module, graph: Graph) -> list[str]:
    """The Python modules that define the custom operators of a layer graph: importing one registers its operators."""
    graphs = [graph, *(g for part in module.modules() if isinstance(part, Region) for g in part.graphs.values())]
    names = {
        node.target._schema.name
        for g in graphs
        for node in g.nodes
        if isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims")
    }
    known = {name: OPDEFS[name] for name in names if name in OPDEFS}
    return sorted({definition._init_fn.__module__ for definition in known.values()})


def import_homes(homes: list[str]) -> None:
    """Import those of the modules that belong to installed packages."""
    for home in homes:
        if is_installed(home):
            import_mended(home)


def encode_graph(graph: Graph) -> Json:
    """A graph as a list of nodes."""
    nodes = []
    for node in graph.nodes:
        target = function_name(node.target) if node.op == "call_function" else str(node.target)
        meta = {k: encode(_plain_meta(k, node.meta[k])) for k in _META if k in node.meta}
        nodes.append(
            {
                "name": node.name,
                "op": node.op,
                "target": target,
                "args": encode(node.args),
                "kwargs": encode(dict(node.kwargs)),
                "meta": meta,
                "value": _encode_value(node.meta.get("val")),
            }
        )
    return nodes


def _plain_meta(key: str, value: Any) -> Any:
    if key == "nn_module_stack":
        return {
            k: (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
            for k, (path, kind) in value.items()
        }
    return value


def _encode_value(value: Any) -> Json:
    """For a tensor (or several): its dtype and sizes, dynamic ones as ["name", example]."""
    if isinstance(value, tuple | list):
        return [_encode_value(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [
        int(s) if isinstance(s, int) or s.node.expr.is_number else [str(s.node.expr), int(s.node.hint)] for s in value.shape
    ]
    return {"dtype": encode(value.dtype), "sizes": sizes, "device": str(value.device)}


def decode_graph(data: Json) -> Graph:
    """The graph that ``encode_graph`` wrote."""
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in data:
        if entry["op"] not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
            raise RewriteError(f"the file's graph holds a node of kind {entry['op']!r}")
        target = function_named(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        made = graph.create_node(
            entry["op"], target, decode(entry["args"], nodes), decode(entry["kwargs"], nodes), entry["name"]
        )
        made.meta = {k: decode(v) for k, v in entry["meta"].items()}
        if entry["value"] is not None:
            made.meta["file_value"] = entry["value"]
        nodes[entry["name"]] = made
    return graph
