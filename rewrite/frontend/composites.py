"""Layers that libraries spell out in several operators: raised to one layer that owns the captured operators.

What such a layer computes is found by experiment, not by patterns: the captured operators run in exact arithmetic on
random input and are compared with the formula. So any spelling, any order of casts is recognised, and kept bit for bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.carve import carve, free_inputs, replace_with_call, used_outside
from rewrite.graph.codegen import compile_graph
from rewrite.graph.nodes import (
    aten,
    fixed_size,
    leaves,
    module_stack,
    mutated_arguments,
    overload,
    packet,
    tensor_value,
)
from rewrite.graph.regions import Region
from rewrite.graph.spelled import NormMeaning, SpelledActivation, SpelledNorm
from rewrite.numerics.exact import ExactArithmetic

from .skeleton import Skeleton

_NORM_MARKS = (
    aten.rsqrt,
    aten.sqrt,
    aten.layer_norm,
    aten.rms_norm,
    aten.var,
    aten.var_mean,
    aten.std,
    aten.pow,
    aten.linalg_vector_norm,
    aten.norm,
    aten.native_layer_norm,
)
_SMOOTH_MARKS = (aten.tanh, aten.sigmoid, aten.erf, aten.pow, aten.softplus, aten.relu, aten.square, aten.mul)
_LONGEST = 24
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Group:
    """The operators that stand directly in one module call, with one tensor going in and one coming out."""

    path: str
    nodes: tuple[Node, ...]
    source: Node
    result: Node
    parameters: tuple[Node, ...]


def raise_composites(graph: Graph, skeleton: Skeleton) -> None:
    """Raise every spelled-out norm and activation of the graph, in place."""
    skeleton.index(graph)
    known: dict[Any, Any] = {}
    made: dict[str, Any] = {}
    for group in groups(graph):
        key = _key(group)
        if key not in known:
            known[key] = _meaning(group)
        meaning = known[key]
        if meaning is not None and made.setdefault(group.path, key) == key:
            _raise(graph, skeleton, group, meaning)


def groups(graph: Graph) -> Iterator[Group]:
    """Candidate groups: two operators or more, no mutation, parameters of their own module only."""
    calls: dict[str, list[Node]] = {}
    paths: dict[str, str] = {}
    for node in graph.nodes:
        stack = module_stack(node)
        if stack and node.op in ("call_function", "call_module"):
            calls.setdefault(stack[-1][0], []).append(node)
            paths[stack[-1][0]] = stack[-1][1]
    for key, nodes in calls.items():
        if 2 <= len(nodes) <= _LONGEST and paths[key] and all(_is_operator(n) for n in nodes):
            group = _group(paths[key], nodes)
            if group is not None:
                yield group


def _is_operator(node: Node) -> bool:
    return overload(node) is not None or node.target is operator.getitem


def _group(path: str, nodes: list[Node]) -> Group | None:
    if any(mutated_arguments(n) for n in nodes):
        return None
    inputs, outputs = free_inputs(nodes), used_outside(nodes)
    parameters = tuple(n for n in inputs if n.op == "get_attr")
    sources = [n for n in inputs if n.op != "get_attr"]
    own = all(str(p.target).rpartition(".")[0] == path for p in parameters)
    if len(sources) != 1 or len(outputs) != 1 or len(parameters) > 2 or not own:
        return None
    value, result = tensor_value(sources[0]), tensor_value(outputs[0])
    if value is None or result is None or not value.is_floating_point() or len(value.shape) != len(result.shape):
        return None
    return Group(path, tuple(nodes), sources[0], outputs[0], parameters)


def _key(group: Group) -> tuple[Any, ...]:
    """Two groups with the same key compute the same, on parameters of the same shape."""
    index = {n: i for i, n in enumerate([group.source, *group.parameters, *group.nodes])}

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return ("%", index[value])
        if isinstance(value, list | tuple):
            return tuple(plain(v) for v in value)
        return repr(value)

    source = tensor_value(group.source)
    assert source is not None
    names = tuple((str(p.target).rpartition(".")[2], str(p.meta["val"].shape)) for p in group.parameters)
    return (
        names,
        tuple(str(fixed_size(s)) for s in source.shape),
        index[group.result],
        tuple((str(n.target), plain(n.args), plain(tuple(sorted(n.kwargs.items())))) for n in group.nodes),
    )


def _raise(graph: Graph, skeleton: Skeleton, group: Group, meaning: Any) -> None:
    body = _own_graph(group)
    whole = skeleton.covers(group.nodes)
    layer: Region = SpelledNorm(body, meaning) if isinstance(meaning, NormMeaning) else SpelledActivation(body, meaning)
    path = group.path
    if path not in skeleton.layers:
        skeleton.put(path, layer, "composite")
    elif skeleton.layers[path][1] != "composite":
        return
    meta = {k: v for k, v in group.result.meta.items() if k in ("nn_module_stack", "stack_trace")}
    (made,) = replace_with_call(graph, path, [group.source], [group.result], group.nodes[-1].next, meta)
    made.meta["whole"] = whole
    group.result.replace_all_uses_with(made, delete_user_cb=lambda user: user not in group.nodes)
    for node in reversed(group.nodes):
        graph.erase_node(node)


def _own_graph(group: Group) -> Graph:
    """The group's operators as a graph of one input; parameters are read from the layer itself."""
    body = carve(group.nodes, [group.result], [group.source, *group.parameters])
    for parameter, placeholder in list(zip(group.parameters, list(body.nodes)[1:], strict=False)):
        with body.inserting_after(placeholder):
            read = body.get_attr(str(parameter.target).rpartition(".")[2])
        read.meta = dict(parameter.meta)
        placeholder.replace_all_uses_with(read)
        body.erase_node(placeholder)
    return body


def _meaning(group: Group) -> NormMeaning | str | None:
    packets = {packet(n) for n in group.nodes}
    if packets & set(_NORM_MARKS):
        meaning = _norm_meaning(group)
        if meaning is not None:
            return meaning
    if not group.parameters and packets & set(_SMOOTH_MARKS):
        return _activation_meaning(group)
    return None


def _small_shape(value: torch.Tensor) -> list[int]:
    """A tensor's shape, 3 for each dynamic size; a size may have become a number after the value was recorded."""
    return [3 if fixed_size(s) is None else int(s) for s in value.shape]


def _run(group: Group, source: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    body = carve(group.nodes, [group.result], [group.source, *group.parameters])
    run, _ = compile_graph(body)
    try:
        with torch.no_grad(), ExactArithmetic():
            result = run(None, source, *parameters)
    except RuntimeError:
        return None  # operators that only fit the captured sizes: not a norm over one axis
    return result if isinstance(result, torch.Tensor) else None


def _norm_meaning(group: Group) -> NormMeaning | None:
    value = tensor_value(group.source)
    assert value is not None
    generator = torch.Generator().manual_seed(0)
    shape = _small_shape(value)
    parameters = [
        torch.randn(_small_shape(p.meta["val"]), generator=generator, dtype=torch.float64) for p in group.parameters
    ]
    source = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.05 + 0.02
    result = _run(group, source, parameters)
    if result is None or result.shape != source.shape:
        return None
    for axis in _axes(shape):
        channels = shape[axis]
        if fixed_size(value.shape[axis]) is None or any(p.numel() != channels for p in parameters):
            continue
        for eps in _numbers(group):
            for kind, normal in _normals(source, axis, eps):
                found = _affine(normal, result, parameters, axis)
                if found is not None:
                    weight, bias, offset = found
                    name = [str(p.target).rpartition(".")[2] for p in group.parameters]
                    return NormMeaning(
                        kind,
                        channels,
                        -1 if axis == len(shape) - 1 else axis,
                        eps,
                        offset,
                        name[weight] if weight is not None else None,
                        name[bias] if bias is not None else None,
                    )
    return None


def _axes(shape: Sequence[int]) -> list[int]:
    return [len(shape) - 1, *([1] if len(shape) > 2 else [])]


def _numbers(group: Group) -> list[float]:
    """Candidates for eps: the floats among the operators' literals, and zero."""
    found = [v for n in group.nodes for v in [*leaves(n.args), *leaves(dict(n.kwargs))] if isinstance(v, float)]
    machine = [torch.finfo(torch.float32).eps]
    return list(dict.fromkeys([*(v for v in found if 0 < v < 0.1), *machine, 0.0]))


def _normals(x: torch.Tensor, axis: int, eps: float) -> Iterator[tuple[str, torch.Tensor]]:
    yield "rms", x * (x.square().mean(axis, keepdim=True) + eps).rsqrt()
    centred = x - x.mean(axis, keepdim=True)
    yield "layer", centred * (centred.square().mean(axis, keepdim=True) + eps).rsqrt()


def _affine(
    normal: torch.Tensor, result: torch.Tensor, parameters: Sequence[torch.Tensor], axis: int
) -> tuple[int | None, int | None, float] | None:
    """Which parameter is the gain, which the bias, and the gain's offset, so that normal becomes result."""
    view = [1] * normal.dim()
    view[axis] = -1
    shaped = [p.reshape(view) for p in parameters]
    places: list[int | None] = [*range(len(parameters)), None]
    for weight in places:
        for bias in places:
            if {weight, bias} - {None} != set(range(len(parameters))) or (weight is not None and weight == bias):
                continue
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                made = normal * (shaped[weight] + offset) if weight is not None else normal
                made = made + shaped[bias] if bias is not None else made
                if _equal(made, result):
                    return weight, bias, offset
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())


def _formulas(x: torch.Tensor) -> Mapping[str, torch.Tensor]:
    f = nn.functional
    return {
        "gelu": f.gelu(x),
        "gelu_tanh": f.gelu(x, approximate="tanh"),
        "silu": f.silu(x),
        "quick_gelu": x * torch.sigmoid(1.702 * x),
        "relu_squared": f.relu(x).square(),
        "mish": f.mish(x),
        "laplace": 0.5 * (1 + torch.erf((x - math.sqrt(0.5)) / (math.sqrt(0.25 / math.pi) * math.sqrt(2)))),
        "softsign": f.softsign(x),
    }


def _activation_meaning(group: Group) -> str | None:
    value = tensor_value(group.source)
    assert value is not None
    shape = _small_shape(value)
    count = math.prod(shape)
    if count == 0:
        return None
    source = torch.linspace(-4, 4, count, dtype=torch.float64)[
        torch.randperm(count, generator=torch.Generator().manual_seed(0))
    ].reshape(shape)
    result = _run(group, source, ())
    if result is None or result.shape != source.shape:
        return None
    return next((name for name, formula in _formulas(source).items() if _equal(formula, result)), None)
