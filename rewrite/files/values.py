"""Literals of a graph as JSON and back, by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from rewrite.errors import RewriteError
from rewrite.graph import ops
from rewrite.torch_private import OpOverload

Json = Any

_PLAIN = (bool, int, str, type(None))

_SYMBOLIC = ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")


def encode(value: Any) -> Json:
    """A literal (or node) of a graph or an attribute of a layer as JSON. Raises RewriteError for anything else."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, OpOverload):
        return {"op": str(value)}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    raise RewriteError(f"a {type(value).__name__} cannot be written to a file: {value!r:.80}")


def decode(value: Json, nodes: Mapping[str, Node] | None = None) -> Any:
    """The value that ``encode`` wrote; nodes are looked up by name."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        assert nodes is not None
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind in ("dtype", "layout", "memory_format"):
        found = getattr(torch, content)
        if not isinstance(found, getattr(torch, kind)):
            raise RewriteError(f"the file names {content!r} as a {kind}")
        return found
    if kind == "device":
        return torch.device(content)
    if kind == "op":
        return operator_named(content)
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in content)
    if kind == "dict":
        return {decode(k, nodes): decode(v, nodes) for k, v in content}
    if kind == "slice":
        return slice(*(decode(v, nodes) for v in content))
    raise RewriteError(f"the file holds an unknown kind of value: {kind}")


def operator_named(name: str) -> OpOverload:
    """The operator ``namespace.name.overload`` that is registered with torch."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, OpOverload):
        raise RewriteError(f"the file uses the operator {name}, which this torch does not have")
    return found


def function_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    for prefix, home in (("operator", operator), ("math", math), ("rewrite", ops), ("torch", torch)):
        name = getattr(target, "__name__", "")
        if getattr(home, name, None) is target:
            return f"{prefix}:{name}"
    raise RewriteError(f"a call of {target} cannot be written to a file")


def function_named(name: str) -> Callable[..., Any]:
    prefix, _, rest = name.partition(":")
    if not rest:
        return operator_named(name)
    home = {"operator": operator, "math": math, "rewrite": ops, "torch": torch}.get(prefix)
    allowed = prefix != "torch" or rest in _SYMBOLIC
    if (
        home is None
        or not allowed
        or rest.startswith("_")
        or not callable(getattr(home, rest, None))
        or rest in ("attrgetter", "methodcaller", "itemgetter", "call")
    ):
        raise RewriteError(f"the file calls {name}, which is no operator")
    found: Callable[..., Any] = getattr(home, rest)
    return found
