"""Whether two modules, attributes or tensors are the same thing: type objects, plain attributes, hooks, bytes, sharing."""

from __future__ import annotations

import copyreg
import types
from collections import OrderedDict
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from rewrite.graph.program import LayerGraph
from rewrite.numerics.compare import same_bytes

_STATE = ("_parameters", "_buffers", "_modules")
#: What a graph module and a layer graph are made of besides, which is compared by itself, or made from it.
_DERIVED = ("graph", "interface", "properties", "code", "runs", "_graph", "_code", "_tracer_cls", "_tracer_extras", "meta")


class Sameness:
    """Compares a program with its copy, thing by thing. What is one object here must be one object there.

    Pairs under comparison count as the same, so that objects may hold each other.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], Any] = {}
        self._partner: dict[int, tuple[Any, Any]] = {}
        self._origin: dict[int, tuple[Any, Any]] = {}

    def unlike(self, a: nn.Module, b: nn.Module, besides: Container[str] = ()) -> str | None:
        """In what ``b`` differs from ``a``, children and what ``besides`` names left aside; None if in nothing."""
        if _kind(a) is not _kind(b):
            return f"{_kind(a).__qualname__} became {_kind(b).__qualname__}"
        if not self._paired(a, b):
            return "what was one module is two, or the other way"
        for kind in ("_parameters", "_buffers"):
            ours, theirs = ({k: v for k, v in getattr(m, kind).items() if k not in besides} for m in (a, b))
            if list(ours) != list(theirs):
                return f"{kind[1:]} {', '.join(ours) or 'none'} became {', '.join(theirs) or 'none'}"
            for name, tensor in ours.items():
                if not self.tensor(tensor, theirs[name]):
                    return f"{kind[1:-1]} {name} changed"
        return self._unlike_attributes(a, b, besides)

    def _unlike_attributes(self, a: nn.Module, b: nn.Module, besides: Container[str]) -> str | None:
        ours, theirs = ({k: v for k, v in _attributes(m).items() if k not in besides} for m in (a, b))
        if ours.keys() != theirs.keys():
            return f"attribute {min(ours.keys() ^ theirs.keys())} came or went"
        changed = (name for name, value in ours.items() if not self.value(value, theirs[name]))
        return next((f"attribute {name} changed" for name in changed), None)

    def tensor(self, a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        """The same bytes, class, kind and ``requires_grad``, shared with the same others."""
        if a is None or b is None:
            return a is b
        same = type(a) is type(b) and a.requires_grad == b.requires_grad and self._paired(a, b)
        return same and (a is b or same_bytes(a, b))

    def value(self, a: Any, b: Any) -> bool:
        """The same plain value, or an object made of the same values."""
        if a is b:
            return True
        if isinstance(a, nn.Module) and isinstance(b, nn.Module):
            return self._module(a, b)
        if type(a) is not type(b):
            return False
        if isinstance(a, _ATOMS):
            return repr(a) == repr(b) if isinstance(a, float | complex) else bool(a == b)
        if type(a) is tuple:  # most of what a graph holds; it holds itself only by way of something else
            return len(a) == len(b) and all(map(self.value, a, b))
        if type(a) in _PLAIN and not a and not b:
            return True
        if (id(a), id(b)) in self._pairs:
            return True
        self._pairs[id(a), id(b)] = (a, b)  # kept, so that no other object takes their place in memory
        return self._compound(a, b)

    def _compound(self, a: Any, b: Any) -> bool:
        match a:
            case list() | tuple():
                return len(a) == len(b) and all(map(self.value, a, b)) and self.value(_extra(a), _extra(b))
            case Mapping():
                return len(a) == len(b) and all(map(self.value, a, b)) and all(map(self.value, a.values(), b.values()))
            case torch.Tensor():
                return self.tensor(a, b)
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                return str(a) == str(b)
            case torch.Generator():
                return bool(torch.equal(a.get_state(), b.get_state()))
            case Node():
                return bool(a.name == b.name)
            case Graph():
                return self.graphs(a, b)
            case slice():
                return self.value((a.start, a.stop, a.step), (b.start, b.stop, b.step))
            case set() | frozenset():
                return a == b or self.value(sorted(a, key=repr), sorted(b, key=repr))
            case types.FunctionType():
                return self._function(a, b)
            case types.MethodType():
                return self.value(a.__func__, b.__func__) and self.value(a.__self__, b.__self__)
            case types.CellType():
                return self.value(_content(a), _content(b))
        return self._object(a, b)

    def graphs(self, a: Graph, b: Graph) -> bool:
        """Node for node the same."""
        return len(a.nodes) == len(b.nodes) and all(map(self._node, a.nodes, b.nodes))

    def _node(self, a: Node, b: Node) -> bool:
        return (a.name, a.op) == (b.name, b.op) and self.value(a.target, b.target) and self.arguments(a, b)

    def arguments(self, a: Node, b: Node) -> bool:
        """The same literals, and nodes of the same names."""
        return self.value(a.args, b.args) and self.value(dict(a.kwargs), dict(b.kwargs))

    def _module(self, a: nn.Module, b: nn.Module) -> bool:
        if (id(a), id(b)) in self._pairs:
            return True
        self._pairs[id(a), id(b)] = (a, b)
        children = list(a._modules) == list(b._modules)
        graphs = self.value(getattr(a, "graph", None), getattr(b, "graph", None))
        same = children and graphs and self.unlike(a, b) is None
        return same and all(map(self.value, a._modules.values(), b._modules.values()))

    def _function(self, a: types.FunctionType, b: types.FunctionType) -> bool:
        return a.__code__ == b.__code__ and self.value(
            (a.__module__, a.__defaults__, a.__kwdefaults__, a.__closure__, _globals(a)),
            (b.__module__, b.__defaults__, b.__kwdefaults__, b.__closure__, _globals(b)),
        )

    def _object(self, a: Any, b: Any) -> bool:
        """By what a copy of the object would be made of; where nothing says that, by ``==``."""
        try:
            left, right = (_parts(value) for value in (a, b))
        except Exception:
            return a is b or bool(a == b)
        return self.value(left, right)

    def _paired(self, a: Any, b: Any) -> bool:
        """Whether the two stand for each other and for nothing else."""
        there, here = self._partner.setdefault(id(a), (a, b)), self._origin.setdefault(id(b), (b, a))
        return there[1] is b and here[1] is a


_ATOMS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    types.BuiltinFunctionType,
)


_PLAIN = (list, dict, set, OrderedDict)


def _kind(module: nn.Module) -> type:
    """The class of a module; where each instance has a class of its own, the class that this one is made from."""
    kind = type(module)
    return kind.__mro__[1] if isinstance(module, GraphModule | LayerGraph) and len(kind.__mro__) > 2 else kind


def _attributes(module: nn.Module) -> dict[str, Any]:
    derived = _DERIVED if isinstance(module, GraphModule | LayerGraph) else ("runs",) if hasattr(module, "graphs") else ()
    return {k: v for k, v in vars(module).items() if k not in _STATE and k not in derived}


def _extra(value: Any) -> dict[str, Any] | None:
    """The attributes that a container of one's own class carries besides its items."""
    return getattr(value, "__dict__", None) or None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _globals(function: types.FunctionType) -> dict[str, Any]:
    return {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}


def _parts(value: Any) -> Any:
    reducer = copyreg.dispatch_table.get(type(value))
    parts = reducer(value) if reducer is not None else value.__reduce_ex__(4)
    if isinstance(parts, str):
        return parts
    return (*parts[:3], *(list(items) for items in parts[3:5] if items is not None))
