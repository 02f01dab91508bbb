"""How single operators carry a value on: which of its axes a hidden dimension lies on before and after.

An operator *carries* a tensor along an axis when it treats that axis as a whole: each output row along it is a sum of
input rows, a part of them, or a multiple of one by a number that is the same along the axis. A row whose mean is 0 then
stays one, and what is added up stays a sum. Additions, moves of axes, slices and concatenations along other axes, dropped
rows and averages over other axes do; what mixes or weights the axis does not. Dropout does, but for its training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import Scale
from rewrite.graph.nodes import aten, call_arguments, hint_of, packet, tensor_value
from rewrite.graph.program import Program
from rewrite.graph.regions import Region
from rewrite.torch_private import _DropoutNd

Rule = Callable[[Node, Mapping[str, Any], Node, int], int | None]
"""(the node, its arguments by name, one of its tensor arguments, an axis of that) -> the axis of the node's value."""


def carried(program: Program, node: Node, operand: Node, axis: int) -> int | None:
    """The axis of ``node``'s value on which ``operand``'s ``axis`` lies, None where the node does not carry it."""
    if node.op == "call_module":
        return _by_layer(program.layer(node), node, operand, axis)
    if node.op != "call_function":
        return None
    if packet(node) is None:
        return _item(node, operand, axis)
    rule = _RULES.get(packet(node))
    return None if rule is None else rule(node, call_arguments(node), operand, axis)


def sources(program: Program, node: Node, axis: int) -> Iterator[tuple[Node, int]]:
    """The operands whose values a node carries on along ``axis`` of its own value, each with the axis that it has there."""
    for operand in node.all_input_nodes:
        for own in range(dimensions(operand)):
            if carried(program, node, operand, own) == axis:
                yield operand, own
                break


def dimensions(node: Node) -> int:
    """The number of axes of a value; of its first part where an operator gives several."""
    value = _tensor(node)
    return 0 if value is None else value.dim()


def size(node: Node, axis: int) -> int:
    """The example's size of a value's axis."""
    value = _tensor(node)
    return 0 if value is None else hint_of(value.shape[axis])


def is_constant(node: Node) -> bool:
    """Whether a value is a parameter or buffer, or one in another shape or dtype."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def scale_of(node: Node) -> Node | None:
    """The value that a node multiplies by a parameter or a number, None where it does not."""
    if packet(node) not in (aten.mul, aten.mul_, aten.div, aten.div_) or len(node.args) != 2:
        return None
    data = [a for a in node.args if isinstance(a, Node) and not is_constant(a)]
    return data[0] if len(data) == 1 else None


def is_shape_alone(node: Node, operand: Node) -> bool:
    """Whether a node takes only the shape, dtype or device of an operand: ``zeros_like(x)``, ``y.to(x)``."""
    if packet(node) in _LIKE:
        return True
    return packet(node) in _AS and next(iter(call_arguments(node).values())) is not operand


def is_carrier(layer: nn.Module) -> bool:
    """Whether a layer passes its input on, in evaluation at least: dropout, stochastic depth."""
    if not isinstance(layer, Region):
        return isinstance(layer, _DropoutNd | nn.Identity)
    evaluation = layer.graphs.get("eval")
    return (
        evaluation is not None
        and all(n.op in ("placeholder", "output") for n in evaluation.nodes)
        and len(layer.graphs["train"].output_node().all_input_nodes) == 1
    )


def passed_on(carrier: nn.Module) -> int:
    """The place of the input that a carrier passes on; what else a region is given may be a tensor whose sizes it reads."""
    if not isinstance(carrier, Region):
        return 0
    evaluation = carrier.graphs["eval"]
    return evaluation.find_nodes(op="placeholder").index(evaluation.output_node().all_input_nodes[0])


def _tensor(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if isinstance(value, list | tuple):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


def sizes(node: Node) -> list[int] | None:
    """The example's sizes of a value, None where there are none to be told."""
    value = _tensor(node)
    try:
        return None if value is None else [hint_of(s) for s in value.shape]
    except (TypeError, ValueError, AttributeError):  # a size that depends on data has no example
        return None


# ---- layers ------------------------------------------------------------------------------------------------------

_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)


def _by_layer(layer: nn.Module, node: Node, operand: Node, axis: int) -> int | None:
    if is_carrier(layer) or isinstance(layer, Scale):
        return axis if node.args[passed_on(layer)] is operand else None
    if isinstance(layer, _POOLS) and axis <= 1:
        return axis
    return None


def _item(node: Node, operand: Node, axis: int) -> int | None:
    """``operator.getitem``: a part of a list of values, each of which was carried there (no ``max`` with its places)."""
    value = operand.meta.get("val")
    carried_list = isinstance(value, list | tuple) and packet(operand) in _RULES
    return axis if carried_list and tensor_value(node) is not None else None


# ---- operators ---------------------------------------------------------------------------------------------------


def _broadcast(node: Node, operand: Node, axis: int) -> int | None:
    """The axis after broadcasting, None where the operand is the same along the result's axis."""
    moved = axis + dimensions(node) - dimensions(operand)
    return moved if size(operand, axis) == size(node, moved) and size(operand, axis) > 1 else None


def _same(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    return axis if operand is _first(named) else None


def _sum(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    return _broadcast(node, operand, axis)


def _scaled(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    """A product with a number, or with a tensor that is the same along the axis."""
    pair = [named.get("self"), named.get("other")]
    moved = _broadcast(node, operand, axis)
    if moved is None or pair[0] is pair[1]:
        return None
    other = pair[1] if operand is pair[0] else pair[0]
    if operand is pair[1] and packet(node) in (aten.div, aten.div_):
        return None
    value = _tensor(other)
    if value is None:
        return moved
    theirs = moved - (dimensions(node) - value.dim())
    return moved if theirs < 0 or hint_of(value.shape[theirs]) == 1 else None


def _chosen(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    """``where`` and ``masked_fill`` with 0, with a condition that is the same along the axis."""
    condition = named.get("condition", named.get("mask"))
    if operand is condition or ("value" in named and named["value"] != 0):
        return None
    moved = _broadcast(node, operand, axis)
    value = _tensor(condition)
    if moved is None or value is None:
        return None
    theirs = moved - (dimensions(node) - value.dim())
    return moved if theirs < 0 or hint_of(value.shape[theirs]) == 1 else None


def _transposed(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    rank = dimensions(operand)
    first, second = (int(named[n]) % rank for n in ("dim0", "dim1"))
    return second if axis == first else first if axis == second else axis


def _permuted(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    return [int(d) % dimensions(operand) for d in named["dims"]].index(axis)


def _moved(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    """``movedim``: what is not moved keeps its order on the axes that are left."""
    rank = dimensions(operand)
    sources, places = (
        [int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])]
        for given in (named["source"], named["destination"])
    )
    if axis in sources:
        return places[sources.index(axis)]
    left = [place for place in range(rank) if place not in places]
    return left[[own for own in range(rank) if own not in sources].index(axis)]


def _matched(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    """Reshapes, views, squeezes, expansions: the axis of the same size with as many elements before it and behind it."""
    before, after = sizes(operand), sizes(node)
    if before is None or after is None or operand is not _first(named):
        return None
    lead, tail, own = math.prod(before[:axis]), math.prod(before[axis + 1 :]), before[axis]
    for place, found in enumerate(after):
        if found == own and math.prod(after[:place]) == lead and math.prod(after[place + 1 :]) == tail:
            return place
    return None


def _expanded(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    return _broadcast(node, operand, axis) if operand is _first(named) else None


def _apart(removes: bool) -> Rule:
    """What works along ``dim``, which is another axis: slices, selections, splits, averages of one axis, rolls, flips."""

    def rule(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
        rank, dims = dimensions(operand), named.get("dim", named.get("dims", 0))
        if operand is not _first(named) or dims is None or rank == 0:
            return None
        given = dims if isinstance(dims, list | tuple) else [dims]
        if not given or not all(isinstance(d, int) for d in given):
            return None
        along = {d % rank for d in given}
        if axis in along:
            return None
        return axis - sum(d < axis for d in along) if removes and not named.get("keepdim") else axis

    return rule


def _joined(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    along = int(named["dim"]) % dimensions(node)
    if packet(node) is aten.stack:
        return axis + (axis >= along)
    return axis if axis != along else None


def _padded(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    place = 2 * (dimensions(operand) - 1 - axis)
    plain = named.get("mode", "constant") == "constant" and named.get("value") in (None, 0, 0.0)
    return axis if plain and all(isinstance(n, int) and n == 0 for n in named["pad"][place : place + 2]) else None


def _indexed(node: Node, named: Mapping[str, Any], operand: Node, axis: int) -> int | None:
    """``x[i, j]`` with tensors for the leading axes alone."""
    indices = named["indices"]
    if operand is not _first(named) or axis < len(indices) or any(not isinstance(i, Node) for i in indices):
        return None
    return axis + dimensions(node) - dimensions(operand)


def _first(named: Mapping[str, Any]) -> Any:
    return next(iter(named.values()), None)


_GROUPS: tuple[tuple[Rule, str], ...] = (
    (_same, "clone contiguous to type_as _to_copy detach alias neg dropout dropout_ feature_dropout lift_fresh_copy"),
    (_sum, "add add_ sub sub_"),
    (_scaled, "mul mul_ div div_"),
    (_chosen, "where masked_fill masked_fill_"),
    (_transposed, "transpose transpose_ swapaxes"),
    (_permuted, "permute"),
    (_moved, "movedim moveaxis"),
    (_matched, "reshape view flatten unflatten unsqueeze unsqueeze_ squeeze squeeze_ _unsafe_view"),
    (_expanded, "expand expand_as repeat"),
    (_apart(False), "slice narrow split split_with_sizes chunk tensor_split roll flip index_select"),
    (_apart(True), "select unbind mean sum"),
    (_joined, "cat stack concat"),
    (_padded, "pad constant_pad_nd"),
    (_indexed, "index"),
)
_LIKE: tuple[Any, ...] = (aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.sym_size)
_LIKE += (aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
_AS = (aten.to, aten.type_as, aten.expand_as, aten.view_as)
_RULES: Mapping[Any, Rule] = {
    getattr(aten, name): rule for rule, names in _GROUPS for name in names.split() if hasattr(aten, name)
}
