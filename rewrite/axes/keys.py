"""Which entries of which tensors become the keys of attention, so that new channels of a head can be 0 there.

Query and key meet along one dimension; as q kᵀ is what counts, new channels do not if one of both is 0 in them. Where
queries, keys and values are packed in one projection, the number of each of its channels is sent through the graph to the
keys: those that arrive there are theirs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.kinds import is_projection
from rewrite.analysis.linears import Linear, linear_of
from rewrite.errors import RewriteError
from rewrite.graph.nodes import attribute, hint_of, map_leaves, tensor_value
from rewrite.graph.program import Program
from rewrite.torch_private import _DropoutNd

from .call import Score
from .dims import Dim
from .table import Table


@dataclass(frozen=True)
class Keys:
    """The entries of tensors that are keys along one axis each: (name, axis) -> one truth value an old entry."""

    entries: dict[tuple[str, int], Sequence[bool]]
    scores: tuple[Score, ...]

    def of(self, name: str, axis: int) -> Sequence[bool] | None:
        """The entries along an axis that are keys; None where none is."""
        return self.entries.get((name, axis))


def keys_of(program: Program, table: Table, dim: Dim) -> Keys:
    """The keys whose channels a dimension is. Raises RewriteError where they cannot be told from the queries."""
    scores = tuple(s for s in table.scores if dim in s.dim.atoms())
    if not scores:
        raise RewriteError("no product of queries and keys in the program's own graph has it")
    found: dict[tuple[str, int], Sequence[bool]] = {}
    for score in scores:
        asking = set(_projections(program, score.query))
        for projection in _projections(program, score.key):
            reached = _reaching(program, projection, score.key)
            if projection in asking and reached & _reaching(program, projection, score.query):
                raise RewriteError(f"{projection.name} gives queries and keys at once")
            for name, axis, count, start in _tensors(program, projection):
                known = found.get((name, axis), [False] * count)
                found[name, axis] = [k or i - start in reached for i, k in enumerate(known)]
    return Keys(found, scores)


def _projections(program: Program, value: Node) -> Iterator[Node]:
    """The projections that a value comes from, back to the first on each way."""
    ahead, seen = [value], set[Node]()
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_projection(program, node):
            yield node
        else:
            ahead += [source for source in node.all_input_nodes if tensor_value(source) is not None or source.users]


def _tensors(program: Program, projection: Node) -> Iterator[tuple[str, int, int, int]]:
    """The tensors that a projection's channels lie along: name, axis, size, and where in it the first channel is."""
    linear = linear_of(program, projection)
    if linear is not None:
        for rows, axis in _rows(linear):
            yield rows.path, axis, attribute(program.module, rows.path).shape[axis], rows.start
        return
    layer = program.layer(projection) if projection.op == "call_module" else None
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise RewriteError(f"{projection.name} gives its keys, which is no linear map known by its tensors")
    for name, tensor in layer.named_parameters(recurse=False):
        yield f"{projection.target}.{name}", 0, tensor.shape[0], 0


def _rows(linear: Linear) -> Iterator[tuple[Any, int]]:
    if len(linear.weight) > 1:
        raise RewriteError(f"{linear.path} gives its keys by several tensors at once")
    yield from ((rows, 0 if linear.layout == "out_in" else 1) for rows in linear.weight if rows.path)
    yield from ((rows, 0) for rows in linear.bias if rows.path)


def _reaching(program: Program, projection: Node, value: Node) -> set[int]:
    """The channels of a projection that arrive at a value; raises RewriteError where more than moves is on the way."""
    like = tensor_value(projection)
    assert like is not None
    sizes = [hint_of(size) for size in like.shape]
    axis = 1 if _is_image(program, projection) else len(sizes) - 1
    numbers = torch.arange(sizes[axis], dtype=torch.float64).reshape([-1 if i == axis else 1 for i in range(len(sizes))])
    known: dict[Node, Any] = {projection: numbers.expand(sizes).clone()}
    try:
        found = _moved(program, value, known)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RewriteError(f"{projection.name} gives queries and keys, which cannot be told apart: {error}") from None
    return {int(number) for number in found.unique()} if isinstance(found, torch.Tensor) else set()


def _is_image(program: Program, projection: Node) -> bool:
    return projection.op == "call_module" and isinstance(program.layer(projection), nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _moved(program: Program, node: Node, known: dict[Node, Any]) -> Any:
    """The numbers at a node: only what moves them is run, so that each stays what it is. None where none gets there."""
    if node not in known:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int):
            known[node] = hint_of(value)
            return known[node]
        if is_projection(program, node):
            return None
        given = {source: _moved(program, source, known) for source in node.all_input_nodes}
        if not any(isinstance(v, torch.Tensor | list | tuple) for v in given.values()):
            known[node] = None
        elif node.op == "call_module" and isinstance(program.layer(node), _DropoutNd | nn.Identity):
            known[node] = given[node.all_input_nodes[0]]
        else:
            known[node] = _called(node, given)
    return known[node]


def _called(node: Node, given: dict[Node, Any]) -> Any:
    """What an operator makes of numbers: a scale is left aside, anything else must give numbers that were there."""
    if node.op != "call_function" or any(v is None for v in given.values()):
        raise ValueError(f"{node.name} is between")
    if node.target is not operator.getitem and _scales(node):
        return next(v for v in given.values() if isinstance(v, torch.Tensor))
    before = {float(n) for v in given.values() for t in _tensors_in(v) for n in t.unique()}
    args = map_leaves((node.args, dict(node.kwargs)), lambda v: given[v] if isinstance(v, Node) else v)
    found = node.target(*args[0], **args[1])  # type: ignore[operator]
    if not {float(n) for t in _tensors_in(found) for n in t.unique()} <= before:
        raise ValueError(f"{node.name} is between, which computes")
    return found


def _tensors_in(value: Any) -> list[torch.Tensor]:
    return [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, torch.Tensor)]


def _scales(node: Node) -> bool:
    """Whether an operator multiplies or divides by a number."""
    name = getattr(node.target, "__name__", "").partition(".")[0]
    return name in ("mul", "div") and len(node.all_input_nodes) == 1
