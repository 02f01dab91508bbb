"""Graphs as JSON and back: a list of nodes with the metadata that survives a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.errors import RewriteError
from rewrite.graph.nodes import leaves
from rewrite.graph.regions import Region
from rewrite.sources.compat import import_mended
from rewrite.sources.installed import Installed
from rewrite.torch_private import OPDEFS, OpOverload

from . import checked
from .checked import Json
from .operators import check_call, function_name, function_named
from .values import decode, encode

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


def import_homes(data: Json, used: Iterable[str], installed: Installed) -> None:
    """Import the modules that register the custom operators which a file uses, if they are installed and name them."""
    custom = {name for name in used if not name.startswith(("aten.", "prims."))}
    wanted = sorted({name.rpartition(".")[0].replace(".", "::") for name in custom})
    for home in checked.items(data, "list of modules", 1000):
        module = checked.path(home, "module")
        if any(installed.registers(module, operator) for operator in wanted):
            import_mended(module)


def operators_used(data: Json) -> Iterator[str]:
    """The operators ``namespace.name.overload`` that an encoded graph calls."""
    for entry in checked.items(data, "graph"):
        target = checked.table(entry, "node", "op", "target")["target"]
        if entry["op"] == "call_function" and isinstance(target, str) and ":" not in target:
            yield target


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
    """The graph that ``encode_graph`` wrote. Its names are identifiers, its calls on the list of operators."""
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in checked.items(data, "graph"):
        checked.table(entry, "node", "name", "op", "target", "args", "kwargs", "meta", "value")
        name = checked.name(entry["name"], "node")
        if name in nodes:
            raise RewriteError(f"its graph has two nodes called {name}")
        nodes[name] = _decode_node(graph, entry, nodes)
    kinds = [node.op for node in graph.nodes]
    if kinds.count("output") != 1 or kinds[-1] != "output":
        raise RewriteError("its graph does not end in one output")
    return graph


def _decode_node(graph: Graph, entry: Json, nodes: dict[str, Node]) -> Node:
    kind, name = entry["op"], entry["name"]
    args, kwargs = decode(entry["args"], nodes), decode(entry["kwargs"], nodes)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise RewriteError(f"the node {name} of its graph has no list of arguments")
    for key in kwargs:
        checked.name(key, "keyword")
    for value in leaves((args, kwargs)):
        if isinstance(value, str):
            checked.words(value, f"argument of {name}")
    made = graph.create_node(kind, _target(kind, entry["target"], args, kwargs), args, kwargs, name)
    meta = checked.table(entry["meta"], "metadata")
    made.meta = {key: _decode_meta(key, value) for key, value in meta.items()}
    if entry["value"] is not None:
        made.meta["file_value"] = entry["value"]
    return made


def _target(kind: str, target: Json, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kind == "call_function":
        found = function_named(target)
        check_call(found, args, kwargs)
        return found
    if kind in ("placeholder", "output"):
        if kind == "placeholder" and (args or kwargs):
            raise RewriteError("an input of its graph has arguments")
        return checked.name(target, "input")
    if kind in ("get_attr", "call_module"):
        return checked.path(target, "module path")
    raise RewriteError(f"its graph holds a node of kind {checked.shown(kind)}")


def _decode_meta(key: str, value: Json) -> Any:
    if key not in _META:
        raise RewriteError(f"a node of its graph has the note {checked.shown(key)}")
    found = decode(value)
    if key == "nn_module_stack":
        pairs = found.values() if isinstance(found, dict) else [None]
        if not all(isinstance(p, tuple) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
            raise RewriteError("a node of its graph does not say which module it is of")
    return found
