"""Literals of a graph as JSON and back, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from rewrite.errors import RewriteError
from rewrite.torch_private import OpOverload

from . import checked
from .checked import Json
from .operators import operator_named

_PLAIN = (bool, int, str, type(None))
_LARGEST = 2**64


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
    """The value that ``encode`` wrote; nodes are looked up by name. Raises RewriteError for anything else."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return checked.whole(value, "number", -_LARGEST, _LARGEST) if type(value) is int else value
    if len(value) != 1:
        raise RewriteError(f"it holds the value {checked.shown(value)}, which is of no kind")
    ((kind, content),) = value.items()
    if kind == "node":
        return _node(content, nodes or {})
    if kind == "float":
        return _float(content)
    if kind in ("dtype", "layout", "memory_format"):
        return _of_torch(kind, content)
    if kind == "device":
        return device(content)
    if kind == "op":
        return operator_named(content)
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in checked.items(content))
    if kind == "dict":
        return _dictionary(content, nodes)
    if kind == "slice" and isinstance(content, list) and len(content) == 3:
        return slice(*(decode(v, nodes) for v in content))
    raise RewriteError(f"it holds an unknown kind of value: {checked.shown(kind)}")


def _node(content: Json, nodes: Mapping[str, Node]) -> Node:
    if not isinstance(content, str) or content not in nodes:
        raise RewriteError(f"its graph uses the node {checked.shown(content)} before it is there")
    return nodes[content]


def _float(content: Json) -> float:
    if content not in ("inf", "-inf", "nan"):
        raise RewriteError(f"it holds {checked.shown(content)} as a number")
    return float(content)


def _of_torch(kind: str, content: Json) -> Any:
    found = vars(torch).get(content) if isinstance(content, str) else None
    if not isinstance(found, getattr(torch, kind)):
        raise RewriteError(f"it names {checked.shown(content)} as a {kind}")
    return found


def _dictionary(content: Json, nodes: Mapping[str, Node] | None) -> dict[Any, Any]:
    made = {}
    for pair in checked.items(content):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RewriteError("it holds a table whose entries are no pairs")
        key = decode(pair[0], nodes)
        if not isinstance(key, str | int | float | bool | tuple | type(None)):
            raise RewriteError(f"it holds a table with the key {checked.shown(key)}")
        made[key] = decode(pair[1], nodes)
    return made


def device(value: Any) -> torch.device:
    """The device that a file names, or the CPU where this machine has none of the kind."""
    kind, _, number = checked.text(value, "device").partition(":")
    if kind not in ("cpu", "meta", "cuda", "mps", "xpu") or not (not number or number.isdecimal()):
        raise RewriteError(f"it names the device {checked.shown(value)}")
    if kind in ("cpu", "meta"):
        return torch.device(kind)
    here = getattr(torch, kind).is_available() if hasattr(torch, kind) else False
    return torch.device(value) if here else torch.device("cpu")
