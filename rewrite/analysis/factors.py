"""Stochastic depth: layers that multiply their input by a factor in training and pass it on in evaluation.

A factor comes in a form that equal draws share: a sum of values multiplied by draws of one form can be multiplied by one
draw of it. Its mean is the same then, and what each sample keeps of the sum is drawn once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.nodes import aten, call_arguments, map_leaves, overload, packet
from rewrite.graph.program import Program
from rewrite.graph.regions import Region

from .carry import is_carrier, is_shape_alone, passed_on

_PRODUCTS = (aten.mul, aten.mul_)
_QUOTIENTS = (aten.div, aten.div_)


def factor_of(program: Program, node: Node) -> str | None:
    """What a layer multiplies its input by in training; None for one that does anything else, or the same in evaluation."""
    layer = program.layer(node) if node.op == "call_module" else None
    if isinstance(layer, nn.Dropout) and type(layer) is not nn.Dropout:
        return f"{type(layer).__module__}.{layer!r}"
    return _of_region(layer, node) if isinstance(layer, Region) and is_carrier(layer) else None


def _of_region(region: Region, call: Node) -> str | None:
    """The factor of a switch by the mode: its operators, with the sizes that the call gives it."""
    train = region.graphs["train"]
    holders = train.find_nodes(op="placeholder")
    data = holders[passed_on(region)]
    values = [a.meta.get("val") if isinstance(a, Node) else a for a in call.args]
    given: dict[Node | None, Any] = dict(zip(holders, values, strict=True))
    others = [h for h in holders if h is not data and not isinstance(given[h], int | torch.SymInt)]
    (result,) = train.output_node().all_input_nodes
    if any(_reads(result, h) for h in others) or not _is_whole(train, result) or not _is_multiple(result, data):
        return None
    return str((_form(result, data, given), region.contexts))


def _is_whole(graph: Graph, result: Node) -> bool:
    """Whether a graph is of operators alone, each of which the result is computed from: nothing is written beside it."""
    needed, ahead = {result}, [result]
    while ahead:
        new = [n for n in ahead.pop().all_input_nodes if n not in needed]
        needed.update(new)
        ahead += new
    inner = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    return all(n.op == "call_function" and n in needed for n in inner)


def _is_multiple(node: Node, data: Node) -> bool:
    """Whether a value is the data times what was computed without its values."""
    if node is data or packet(node) not in (*_PRODUCTS, *_QUOTIENTS) or len(node.args) != 2 or node.kwargs:
        return node is data
    first, second = node.args
    if _reads(second, data) and packet(node) in _PRODUCTS:
        first, second = second, first
    return isinstance(first, Node) and _is_multiple(first, data) and not _reads(second, data)


def _reads(value: Any, given: Node) -> bool:
    """Whether a value depends on another's values."""
    if not isinstance(value, Node):
        return False
    return value is given or any(_reads(n, given) for n in value.all_input_nodes if not is_shape_alone(value, n))


def _form(node: Node, data: Node, given: dict[Node | None, Any]) -> Any:
    """A value as its operators, its literals and the sizes that the call gives; the data by its place."""
    if node is data:
        return "x"
    source = next(iter(node.all_input_nodes), None)
    if packet(node) is aten.sym_size and source in given:
        return str(given[source].shape[call_arguments(node)["dim"]])  # whichever tensor it is the size of
    if node in given:
        return str(given[node])
    arguments = map_leaves([node.args, dict(node.kwargs)], lambda a: _form(a, data, given) if isinstance(a, Node) else a)
    return str(overload(node) or node.target), arguments
