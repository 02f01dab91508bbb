"""The axis analysis: one walk over a program in which every rule tells which dimensions of its arguments are one.

    table = analyze(program)
    print(table.named["ffn.0"].size, [place.path for place in table.places_of(table.named["ffn.0"])])

An analysis is of one state of a program: ask again after an edit. The cost is linear in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.fakes import Fakes, evaluating, fake_value
from rewrite.graph.nodes import attribute, call_arguments, hint_of
from rewrite.graph.program import Program
from rewrite.graph.regions import Region
from rewrite.graph.spelled import SpelledNorm
from rewrite.graph.tree import names_of_tensors
from rewrite.torch_private import make_fx, pytree

from . import complexes, images, mixtures, moves, products, tables  # noqa: F401, each registers its rules
from .call import Axes, Call, Notes, parameters_of
from .dims import Dim
from .followers import of_training
from .layers import rule_of
from .operators import by_operator, is_added
from .table import Table, tabulated


def analyze(program: Program) -> Table:
    """The logical dimensions of a program, named, with all that lies along each."""
    notes = Notes(names={key: names[0] for key, names in names_of_tensors(program.module).items()})
    walk = Walk(program.module, notes)
    dynamic = {(d.input, d.axis) for d in program.dimensions if d.dynamic}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                kinds = ("a size of the input", "the input has this size")
                walk.known[node] = [
                    Dim(hint_of(size), f"{node.name}: {kinds[(node.name, axis) not in dynamic]}")
                    for axis, size in enumerate(value.shape)
                ]
    walk.run(program.graph)
    for value in program.graph.output_node().all_input_nodes:
        for dim in walk.axes(value):
            dim.use("output")
    return tabulated(program, notes, walk.known)


class Walk:
    """Visits the nodes of a graph in order; ``known`` has the dimensions of each value.

    ``region`` is the path of the region whose graph it is, "" for the program's own, None where numbers cannot be edited.
    ``in_norm``: what is reduced there is what a norm normalizes.
    """

    def __init__(self, module: nn.Module, notes: Notes, region: str | None = "") -> None:
        self.module = module
        self.notes = notes
        self.known: dict[Node, Any] = {}
        self.region = region
        self.values: dict[Node, Any] = {}
        self.in_norm = False

    def axes(self, value: Any) -> Axes:
        """Every dimension of a value."""
        found = self.known.get(value)
        return [d for d in pytree.tree_leaves(found) if isinstance(d, Dim)]

    def run(self, graph: Graph) -> None:
        """Visit every node but placeholders and the output."""
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = attribute(self.module, str(node.target))
                if isinstance(tensor, torch.Tensor):
                    self.known[node] = list(self.notes.axes_of(tensor))
                    for axis in range(tensor.dim()):
                        self.notes.place(tensor, axis, "value")
            elif node.op == "call_module":
                self.known[node] = self._layer(node)
            elif node.op == "call_function":
                self.known[node] = self._operator(node)

    def _operator(self, node: Node) -> Any:
        call = Call(node, call_arguments(node), self.known, self.notes, self.module, self.region, self.values.get(node))
        call.in_norm = self.in_norm
        return _checked(call, lambda: by_operator(call))

    def _layer(self, node: Node) -> Any:
        layer = attribute(self.module, str(node.target))
        call = Call(node, {}, self.known, self.notes, self.module, self.region, self.values.get(node))
        rule = rule_of(layer)
        if rule is not None:
            return _checked(call, lambda: rule(call, layer, str(node.target)))
        given: list[Any] = [self.known.get(v) if isinstance(v, Node) else None for v in (*node.args, *node.kwargs.values())]
        if isinstance(layer, Region):
            path = str(node.target) if self.region == "" else None
            found = []
            for graph in layer.graphs.values():
                walk = Walk(layer, self.notes, path)
                walk.in_norm = isinstance(layer, SpelledNorm)
                walk.values = _inferred(layer, graph, [v.meta.get("val") if isinstance(v, Node) else v for v in node.args])
                found.append(self._within(walk, graph, given))
            if isinstance(layer, SpelledNorm):
                dim = self.axes(node.args[0])[layer.channel_axis]
                dim.use("norm")
                call.attribute(str(node.target), "channels", dim)
            return _checked(call, lambda: _together(call, found))
        traced = _traced(node, layer)
        if traced is None:
            for tensor in parameters_of(layer):
                call.freeze(self.notes.axes_of(tensor), f"{type(layer).__name__} has no rule")
            return call.unruled(type(layer).__name__)
        graph, state = traced
        own = [list(self.notes.axes_of(tensor)) for tensor in state.values()]
        walk = Walk(layer, self.notes, None)
        found = _checked(call, lambda: self._within(walk, graph, [*own, *given], list(state.values())))
        places = [n for n in graph.nodes if n.op == "placeholder"]
        unread = {name: state[name] for name, place in zip(state, places, strict=False) if not place.users}
        of_training(call, layer, unread, [*own, *(axes for axes in given if axes is not None)])
        return found

    def _within(self, walk: Walk, graph: Graph, given: Sequence[Any], tensors: Sequence[torch.Tensor] = ()) -> Any:
        """The dimensions of what a graph within a layer gives; its placeholders are given those of ``given``."""
        places = [n for n in graph.nodes if n.op == "placeholder"]
        walk.known.update((place, axes) for place, axes in zip(places, given, strict=False) if axes is not None)
        walk.run(graph)
        for place, tensor in zip(places, tensors, strict=False):
            for axis in range(tensor.dim()):
                self.notes.place(tensor, axis, "added" if is_added(place) else "elementwise")
        return pytree.tree_map(lambda v: walk.known.get(v) if isinstance(v, Node) else v, graph.output_node().args[0])


def _inferred(layer: nn.Module, graph: Graph, given: Sequence[Any]) -> dict[Node, Any]:
    """The values within a region for what it is given now: those at its nodes are of the time when it was made."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    values: dict[Node, Any] = dict(zip(places, given, strict=False))
    if all(_layout(place.meta.get("val")) == _layout(value) for place, value in values.items()):
        return {}
    known = Fakes()
    for node in graph.nodes:
        if node.op in ("call_function", "call_module", "get_attr"):
            values[node] = fake_value(layer, node, values, known)
    return values


def _layout(value: Any) -> Any:
    return tuple(map(hint_of, value.shape)) if isinstance(value, torch.Tensor) else None


def _together(call: Call, found: Sequence[Any]) -> Any:
    """The dimensions of a value that is computed in several ways, one in each mode."""
    for other in found[1:]:
        for a, b in zip(pytree.tree_leaves(found[0]), pytree.tree_leaves(other), strict=False):
            if isinstance(a, Dim) and isinstance(b, Dim):
                call.unify(a, b)
    return found[0]


def _checked(call: Call, rule: Any) -> Any:
    """What a rule gives, if it is of the value's sizes; otherwise nothing is known."""
    try:
        found = rule()
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        return call.unruled(f"{call.node.target} ({type(error).__name__}: {error})")
    for axes, sizes in zip(_parts(found), call.all_sizes, strict=False):
        if [d.size for d in axes] != sizes:
            return call.unruled(f"{call.node.target} (its value has other sizes than its rule says)")
    is_one = isinstance(call.node.meta.get("val"), torch.Tensor)
    return next(iter(_parts(found)), None) if is_one else found


def _parts(found: Any) -> list[Axes]:
    """The dimensions of each tensor of a value, which has one or several."""
    if isinstance(found, list) and all(isinstance(d, Dim) for d in found):
        return [found]
    return [part for each in found for part in _parts(each)] if isinstance(found, list | tuple) else []


def _traced(node: Node, layer: nn.Module) -> tuple[Graph, dict[str, torch.Tensor]] | None:
    """The operators that a layer's forward calls in evaluation, and its tensors by name, which come before its inputs;
    None where it cannot be traced.
    """
    values = [v.meta.get("val") if isinstance(v, Node) else v for v in node.args]
    if node.kwargs or not all(isinstance(v, torch.Tensor | int | float | bool | None) for v in values):
        return None
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def called(tensors: list[torch.Tensor], *inputs: Any) -> Any:
        return torch.func.functional_call(layer, dict(zip(state, tensors, strict=True)), inputs)

    given = [torch.empty([hint_of(s) for s in v.shape], dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in values]
    try:
        with evaluating(layer), torch.no_grad():
            made = make_fx(called, tracing_mode="fake")([torch.empty_like(t) for t in state.values()], *given)
    except Exception:  # whatever the layer's code raises, it cannot be looked into
        return None
    return made.graph, state
