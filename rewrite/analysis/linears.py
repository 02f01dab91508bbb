"""Linear maps of a layer graph, whatever they are spelled as: layers, or products with parameters and parts of them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.fx import Node

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import (
    aten,
    attribute,
    call_arguments,
    fixed_size,
    gives_kind_alone,
    module_path,
    module_stack,
    packet,
    tensor_value,
)
from rewrite.graph.program import Program
from rewrite.torch_private import _DropoutNd

from .carry import carried

Layout = Literal["out_in", "in_out", "convolution"]
_READ: dict[Layout, int] = {"out_in": -1, "in_out": 0, "convolution": 1}
"""The axis of a weight that lies along what is read."""
_ALL = (0, 2**62)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SPLITS = (aten.split_with_sizes, aten.split, aten.chunk, aten.tensor_split)


@dataclass(frozen=True)
class Rows:
    """What of a tensor counts: the entries ``start`` to ``stop`` along its output axis; ``path`` "" is a constant zero."""

    path: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Rows) -> bool:
        """Whether both hold an entry in common, if they are of one tensor."""
        return self.start < other.stop and other.start < self.stop


@dataclass(frozen=True)
class Linear:
    """One linear map in a graph: y = x Wᵀ + b, with W [out_features, in_features].

    W is ``weight``, tensors of the model put one below the other, each kept as ``layout`` says ("in_out": transposed). A
    "convolution" is one with W [out_features, *kernel, in_features]: such a map at each place of its kernel, added up.
    b is ``bias``, likewise; empty without one. ``layer`` is the layer that computes it, at ``path``, or None: then it
    is a product with free parameters (a packed projection, a concatenated bias) in the code of the module at ``path``.
    """

    node: Node
    source: Node
    path: str
    in_features: int
    out_features: int
    weight: tuple[Rows, ...]
    bias: tuple[Rows, ...]
    layout: Layout
    layer: nn.Module | None

    @property
    def types(self) -> tuple[str, ...]:
        """Names that ``type:`` selects it by: Linear, the layer's class and the user's."""
        stack = module_stack(self.node)
        kinds = ["Linear", type(self.layer).__name__ if self.layer is not None else "", stack[-1][2] if stack else ""]
        return tuple(dict.fromkeys(kind.rpartition(".")[2] for kind in kinds if kind))


def matrix(tensor: Tensor, layout: Layout) -> Tensor:
    """W, the channels that are read last, of a tensor in a layout."""
    return tensor.movedim(_READ[layout], -1)


def in_layout(weight: Tensor, layout: Layout) -> Tensor:
    """A tensor in a layout of W: the inverse of ``matrix``."""
    return weight.movedim(-1, _READ[layout]).contiguous()


def linears(program: Program) -> list[Linear]:
    """Every call of a linear map, in execution order."""
    found = (linear_of(program, node) for node in program.graph.nodes)
    return [linear for linear in found if linear is not None]


def linear_of(program: Program, node: Node) -> Linear | None:
    """The linear map that a node computes from a value and the model's parameters, or None."""
    if node.op == "call_module":
        return _layer(program, node)
    return _product(program, node) if packet(node) is aten.linear else None


def convolution_of(program: Program, node: Node) -> Linear | None:
    """The convolution without groups that a node computes, as a linear map of its channels; None if it computes none."""
    layer: Any = program.layer(node) if node.op == "call_module" else None
    path = str(node.target)
    if type(layer) not in _CONVOLUTIONS or layer.groups != 1 or not isinstance(node.args[0], Node):
        return None
    sizes = layer.in_channels, layer.out_channels
    weight, bias = (Rows(f"{path}.{name}", 0, sizes[1]) for name in ("weight", "bias"))
    own = (bias,) if layer.bias is not None else ()
    return Linear(node, node.args[0], path, *sizes, (weight,), own, "convolution", layer)


def pads(layer: object) -> bool:
    """Whether a layer reads zeros beside what it is given."""
    padding = getattr(layer, "padding", 0)
    sizes = padding if isinstance(padding, tuple) else (padding,)
    return any(size not in (0, "valid") for size in sizes)


def _layer(program: Program, node: Node) -> Linear | None:
    layer, path = program.layer(node), str(node.target)
    if not isinstance(layer, nn.Linear | TransposedLinear) or not isinstance(node.args[0], Node):
        return None
    sizes = layer.in_features, layer.out_features
    bias = (Rows(f"{path}.bias", 0, sizes[1]),) if layer.bias is not None else ()
    layout: Layout = "out_in" if isinstance(layer, nn.Linear) else "in_out"
    return Linear(node, node.args[0], path, *sizes, (Rows(f"{path}.weight", 0, sizes[1]),), bias, layout, layer)


def _product(program: Program, node: Node) -> Linear | None:
    named = call_arguments(node)
    weight = rows_of(program, named["weight"])
    bias = rows_of(program, named["bias"]) if named["bias"] is not None else ()
    value, source = tensor_value(named["weight"]), named["input"]
    if not weight or bias is None or value is None or value.dim() != 2 or not isinstance(source, Node):
        return None
    inner = fixed_size(value.shape[1])
    if inner is None or not all(isinstance(attribute(program.module, rows.path), nn.Parameter) for rows in weight):
        return None
    out = sum(rows.size for rows in weight)
    return Linear(node, source, module_path(node), inner, out, weight, bias, "out_in", None)


def rows_of(program: Program, node: Any) -> tuple[Rows, ...] | None:
    """What of which tensors a node puts together along its first axis; None if it computes anything else."""
    value = tensor_value(node)
    if value is None or not value.dim() or (size := fixed_size(value.shape[0])) is None:
        return None
    if node.op == "get_attr":
        return (Rows(str(node.target), 0, size),)
    if packet(node) is aten.cat:
        named = call_arguments(node)
        parts = [rows_of(program, part) for part in cast("list[Node]", named["tensors"])] if named["dim"] == 0 else [None]
        return None if None in parts else tuple(rows for part in parts if part for rows in part)
    if packet(node) in (aten.zeros_like, aten.zeros):
        return (Rows("", 0, size),)
    cut = _cut(node)
    inner = rows_of(program, cut[0]) if cut is not None else None
    if cut is None or inner is None or len(inner) != 1:
        return None
    return (Rows(inner[0].path, inner[0].start + cut[1], inner[0].start + cut[1] + size),)


def _cut(node: Node) -> tuple[Node, int] | None:
    """The tensor that a node is a piece of, along the first axis, and where in it the piece begins."""
    named = call_arguments(node)
    if packet(node) is aten.slice and (named["dim"], named["step"]) == (0, 1):
        source, start = named["self"], named["start"] or 0
        return (source, start) if isinstance(source, Node) and isinstance(start, int) and start >= 0 else None
    if node.target is not operator.getitem:
        return None
    whole, place = node.args
    if not isinstance(whole, Node) or packet(whole) not in _SPLITS or call_arguments(whole)["dim"] != 0:
        return None
    sizes = [fixed_size(part.shape[0]) for part in whole.meta["val"]]
    source = next(iter(call_arguments(whole).values()))
    if not isinstance(place, int) or not isinstance(source, Node) or None in sizes:
        return None
    return source, [0, *accumulate(size for size in sizes if size is not None)][place]


class Readers:
    """Which nodes read which tensor, and what of it. A layer reads all of its own."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._of: dict[int, list[tuple[Node, Rows]]] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr" and not gives_kind_alone(node):
                found = attribute(program.module, str(node.target))
                self._of.setdefault(id(found), []).extend(_ends(program, node, str(node.target)))
            elif node.op == "call_module":
                layer = program.layer(node)
                for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                    self._of.setdefault(id(tensor), []).append((node, Rows(f"{node.target}.{name}", *_ALL)))

    def of(self, rows: Rows) -> list[tuple[Node, Rows]]:
        """The nodes that read any of ``rows``, under whatever name."""
        found = self._of.get(id(attribute(self._program.module, rows.path)), ())
        return [(node, other) for node, other in found if other.overlaps(rows)]


def _ends(program: Program, node: Node, path: str) -> list[tuple[Node, Rows]]:
    """The nodes that compute with a tensor, with what of it reaches them: pieces and concatenations are looked through."""
    found: list[tuple[Node, Rows]] = []
    own = [rows for rows in rows_of(program, node) or () if rows.path == path] or [Rows(path, *_ALL)]
    for user in node.users:
        looked_through = packet(user) in _SPLITS or rows_of(program, user) is not None
        found += _ends(program, user, path) if looked_through else [(user, rows) for rows in own]
    return found


_MOVES = frozenset(
    getattr(aten, name)
    for names in (
        "transpose permute movedim reshape view flatten unflatten unsqueeze squeeze expand contiguous clone",
        "select slice narrow index mean",
    )
    for name in names.split()
)


def readers(program: Program, node: Node, axis: int, *, averages: bool = True) -> Iterator[tuple[Node, Node, int]]:
    """Who reads a value along an axis, with the node it is read from, and the axis there: (reader, source, axis).

    Nodes that move, choose or average along the other axes are looked through: what they give of an affine map of the
    axis is that map of what they give. So is a dropout that drops nothing. Without ``averages`` those that average
    are not: what comes of each row by itself does not come of their mean.
    """
    for user in node.users:
        moved = _moved(program, user, node, axis) if averages or packet(user) is not aten.mean else None
        if moved is None:
            yield user, node, axis
        else:
            yield from readers(program, user, moved, averages=averages)


def _moved(program: Program, node: Node, source: Node, axis: int) -> int | None:
    """The axis of a node's value on which a value's axis lies, None where the node is not to be looked through."""
    layer: Any = program.layer(node) if node.op == "call_module" else None
    dropless = isinstance(layer, _DropoutNd) and not layer.p
    return carried(program, node, source, axis) if packet(node) in _MOVES or dropless else None
