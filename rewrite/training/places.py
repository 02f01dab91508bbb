"""What can be computed again in the backward: the modules of a model as regions, norms and activations by their result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from rewrite.graph.module_calls import ModuleCall, module_calls
from rewrite.graph.nodes import aten, attribute, module_stack, mutated_arguments, packet, tensor_value
from rewrite.graph.program import Program
from rewrite.graph.regions import Region
from rewrite.graph.spelled import SpelledActivation, SpelledNorm

from .kept import ACTIVATIONS, NORMS, keeper


@dataclass(frozen=True)
class Place:
    """A module path that can be computed again, or why not (``obstacle``).

    A layer of one operator (``is_layer``) by its result, any other module by all that it keeps; a norm spelled out is both.
    """

    path: str
    types: tuple[str, ...]
    is_layer: bool
    is_region: bool
    is_own: bool
    obstacle: str = ""

    @property
    def is_standard(self) -> bool:
        """Whether it is computed again unless others are named: a block, a norm, an activation."""
        return self.is_layer or self.path.rpartition(".")[2].isdigit()


def places(program: Program) -> list[Place]:
    """Every place, regions before what they hold."""
    layers = {str(node.target): (node, layer) for node, layer in reversed(list(program.layers()))}
    found = {path: _layer(program, *layers[path]) for path in layers if _is_single(layers[path][1])}
    for path, kind in _modules(program).items():
        if path not in layers and isinstance(attribute(program.module, path), nn.Module):
            found[path] = _region(program, path, kind)
    return sorted(found.values(), key=lambda place: (place.path.count("."), place.path))


def gates(program: Program) -> Iterator[Place]:
    """Activations f of gated products f(g) · u of one shape: both factors and g are kept, of which f(g) need not be."""
    for node, layer in program.layers():
        if not isinstance(layer, (*ACTIVATIONS, SpelledActivation)) or getattr(layer, "inplace", False):
            continue
        readers = list(node.users)
        if len(readers) == 1 and packet(readers[0]) is aten.mul and _is_gate(readers[0], node):
            yield _layer(program, node, layer)


def _is_gate(product: Node, gate: Node) -> bool:
    others = [n for n in product.all_input_nodes if n is not gate]
    values = [tensor_value(n) for n in (gate, *others)]
    shapes = [None if value is None else value.shape for value in values]
    free = [n.op != "get_attr" and n not in gate.all_input_nodes for n in others]
    return len(others) == 1 and all(free) and shapes[0] is not None and shapes[0] == shapes[1]


def adding(value: Mapping[str, Any] | None, taken: Iterable[Place]) -> dict[str, list[str]]:
    """The value of the property ``recompute`` with more places."""
    made = {name: list((value or {}).get(name, ())) for name in ("outputs", "regions")}
    for place in taken:
        for name, holds in (("outputs", place.is_layer), ("regions", place.is_region)):
            if holds and place.path not in made[name]:
                made[name].append(place.path)
    return made


def _is_single(layer: nn.Module) -> bool:
    return isinstance(layer, (*NORMS, *ACTIVATIONS, SpelledNorm, SpelledActivation))


def _layer(program: Program, node: Node, layer: nn.Module) -> Place:
    calls = [n for n in program.graph.nodes if n.op == "call_module" and n.target == node.target]
    stack = module_stack(node)
    types = (type(layer).__name__, stack[-1][2].rpartition(".")[2] if stack else "")
    obstacle = "it writes in place" if getattr(layer, "inplace", False) else ""
    if not obstacle and not isinstance(layer, Region) and not any(keeper(program, call, results=False) for call in calls):
        obstacle = "nothing keeps its result"
    own = bool(stack) and stack[-1][1] == str(node.target)
    return Place(str(node.target), tuple(t for t in types if t), True, isinstance(layer, Region), own, obstacle)


def _modules(program: Program) -> dict[str, str]:
    """The modules of the user's that were called, the model itself left aside, with their class."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            found.update((path, kind.rpartition(".")[2]) for _, path, kind in module_stack(node) if path)
    return found


def _region(program: Program, path: str, kind: str) -> Place:
    calls = module_calls(program.graph, path)
    obstacle = next(filter(None, (_obstacle(program, call) for call in calls)), "")
    return Place(path, (kind,), False, True, True, obstacle)


def _obstacle(program: Program, call: ModuleCall) -> str:
    """Why a call of a module cannot be run a second time."""
    if not any(n.op == "call_module" or n.op == "call_function" for n in call.nodes):
        return "it computes nothing"
    if not any(_is_differentiable(n) for n in call.results):
        return "no gradient flows through what it gives"
    written = next(_written(program, call), None)
    return f"it writes into {written}, which it was given" if written is not None else ""


def _is_differentiable(node: Node) -> bool:
    value = tensor_value(node)
    return value is None or value.is_floating_point() or value.is_complex()


def _written(program: Program, call: ModuleCall) -> Iterator[str]:
    """What of its inputs a call writes into, directly or through a view."""
    given = {*call.sources}
    for node in call.nodes:
        layer = attribute(program.module, str(node.target)) if node.op == "call_module" else None
        targets = node.all_input_nodes[:1] if getattr(layer, "inplace", False) else mutated_arguments(node)
        yield from (target.name for target in targets if target in given)
