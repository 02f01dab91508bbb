"""Calling conventions as JSON and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rewrite.errors import RewriteError
from rewrite.graph.conditions import Condition
from rewrite.graph.interface import Argument, Interface
from rewrite.sources.compat import import_mended
from rewrite.torch_private import pytree

from .values import Json, decode, encode


def encode_interface(interface: Interface) -> Json:
    """A calling convention; where a default or an output class has no JSON form, a plain one stands in."""
    parameters = [
        {"name": p.name, "kind": p.kind.name, **_encode_default(p)} for p in interface.signature.parameters.values()
    ]
    arguments = [
        {"name": a.name, "spec": pytree.treespec_dumps(a.spec), "leaves": list(a.leaves), "constants": encode(a.constants)}
        for a in interface.arguments
    ]
    return {
        "parameters": parameters,
        "arguments": arguments,
        "input_count": interface.input_count,
        "output_specs": [_encode_spec(s) for s in interface.output_specs],
        "shapes": [list(s) for s in interface.shapes],
        "conditions": [[c.expression, c.words] for c in interface.conditions],
        "dropped_outputs": list(interface.dropped_outputs),
    }


def _encode_default(parameter: inspect.Parameter) -> Json:
    if parameter.default is inspect.Parameter.empty:
        return {}
    try:
        return {"default": encode(parameter.default)}
    except RewriteError:
        return {"default": None}


def plain_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The same structure in dicts, lists and tuples alone, so that reading it needs no library."""
    return pytree.tree_structure(plain(pytree.tree_unflatten([0] * spec.num_leaves, spec)))


def plain(value: Any) -> Any:
    """A nest of containers with dicts, lists and tuples in place of any other class."""
    if pytree.tree_is_leaf(value):
        return value
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    items, _ = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    return [plain(v) for v in items] if isinstance(value, list) else tuple(plain(v) for v in items)


def _encode_spec(spec: pytree.TreeSpec) -> Json:
    try:
        full: str | None = pytree.treespec_dumps(spec)
    except Exception:
        full = None
    homes = sorted({n.type.__module__ for n in _spec_nodes(spec) if n.type is not None})
    return {"plain": pytree.treespec_dumps(plain_spec(spec)), "full": full, "homes": homes}


def _spec_nodes(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return [spec, *(inner for child in spec.children() for inner in _spec_nodes(child))]


def _decode_spec(data: Json, importable: Callable[[str], bool]) -> pytree.TreeSpec:
    if data["full"] is not None:
        try:
            for home in data["homes"]:
                if importable(home):
                    import_mended(home)
            return pytree.treespec_loads(data["full"])
        except (ImportError, RuntimeError, KeyError, ValueError, AttributeError):
            pass  # the library that defines the output class is not here, or broken: plain containers then
    return pytree.treespec_loads(data["plain"])


def decode_interface(data: Json, importable: Callable[[str], bool]) -> Interface:
    """The calling convention that ``encode_interface`` wrote; ``importable`` says which modules may be imported."""
    parameters = [
        inspect.Parameter(
            p["name"],
            inspect._ParameterKind[p["kind"]],
            default=decode(p["default"]) if "default" in p else inspect.Parameter.empty,
        )
        for p in data["parameters"]
    ]
    arguments = tuple(
        Argument(a["name"], pytree.treespec_loads(a["spec"]), tuple(a["leaves"]), decode(a["constants"]))
        for a in data["arguments"]
    )
    first, second = (_decode_spec(s, importable) for s in data["output_specs"])
    return Interface(
        inspect.Signature(parameters),
        arguments,
        data["input_count"],
        (first, second),
        tuple(tuple(s) for s in data["shapes"]),
        tuple(Condition(e, w) for e, w in data["conditions"]),
        tuple(data["dropped_outputs"]),
    )
