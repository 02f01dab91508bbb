"""FakeTensor values for the nodes of a graph that was read from a file."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.errors import RewriteError, first_line
from rewrite.graph.export import quiet
from rewrite.graph.fakes import Fakes, fake_value
from rewrite.graph.nodes import attribute, hint_of
from rewrite.graph.program import LayerGraph
from rewrite.torch_private import FakeTensorMode, OpOverload, ShapeEnv, TorchDispatchMode, size_symbol

from . import checked
from .checked import LARGEST
from .values import decode, device

_RESULTS = 65_536
"""The most tensors that one operator may give: a split into more is refused before it is made."""
_CALLS = 100_000
"""The most operators that one node may come to: a recurrent one is a loop over its steps."""


def revalue(module: LayerGraph, graph: Graph) -> None:
    """Give every node its FakeTensor value again, from the sizes that the file names.

    Raises RewriteError where a node cannot be computed, or comes to more than any model's.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols: dict[str, torch.SymInt] = {}
    bounded = _Bounded()
    with quiet(), bounded:
        _propagate(module, graph, mode, symbols, bounded)


class _Bounded(TorchDispatchMode):
    """Counts the operators that a node comes to, and refuses results in more parts than any model's."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        several = any("List[Tensor]" in str(result.type) for result in func._schema.returns)
        longest = max((hint_of(n) for n in getattr(args[0], "shape", ())), default=0) if several and args else 0
        if self.calls > _CALLS or longest > _RESULTS:
            raise RewriteError(f"{func} in its graph comes to more tensors than any model's")
        return func(*args, **(kwargs or {}))


def _propagate(
    module: LayerGraph, graph: Graph, mode: FakeTensorMode, symbols: dict[str, torch.SymInt], bounded: _Bounded
) -> None:
    known = module.shapes
    for node in graph.nodes:
        written = node.meta.pop("file_value", None)
        bounded.calls = 0
        if node.op == "placeholder":
            node.meta["val"] = _input_value(node.name, written, mode, symbols)
        elif node.op == "get_attr":
            node.meta.update(_held_value(module, node, mode))
        elif node.op != "output":
            _check_call(module, node)
            node.meta["val"] = _computed(module, node, written, mode, known)
            _check_number(node)


def _held_value(module: LayerGraph, node: Node, mode: FakeTensorMode) -> dict[str, Any]:
    value = attribute(module, str(node.target))
    if value is None or (callable(value) and not isinstance(value, nn.Module)):
        raise RewriteError(f"its graph reads {node.target}, which it does not hold")
    if not isinstance(value, torch.Tensor):
        return {}
    return {"val": mode.from_tensor(value.detach(), static_shapes=True)}


def _check_call(module: LayerGraph, node: Node) -> None:
    """A layer that is called is there; a function on sizes is given no list of tensors, which it would repeat."""
    if node.op == "call_module" and not isinstance(attribute(module, str(node.target)), nn.Module):
        raise RewriteError(f"its graph calls the layer {node.target}, which it does not hold")
    on_sizes = node.op == "call_function" and not isinstance(node.target, OpOverload)
    if on_sizes and node.target is not operator.getitem:
        for given in node.all_input_nodes:
            if isinstance(given.meta.get("val"), list | tuple):
                raise RewriteError(f"its graph calculates with {given.name}, which is no number")


def _check_number(node: Node) -> None:
    value = node.meta["val"]
    hint = value.node.hint if isinstance(value, torch.SymInt) else value
    if isinstance(hint, int) and abs(hint) > LARGEST:
        raise RewriteError(f"the number {node.name} of its graph is larger than any size")


def _computed(module: LayerGraph, node: Node, written: Any, mode: FakeTensorMode, known: Fakes) -> Any:
    try:
        return fake_value(module, node, known=known)
    except RewriteError:
        raise
    except Exception as error:  # operators that dynamic sizes defeat, as recurrent ones do: the example's sizes then
        if written is None:
            raise RewriteError(f"the node {node.name} of its graph cannot be computed: {first_line(error)}") from None
        return _example_value(written, mode)


def _input_value(name: str, data: Any, mode: FakeTensorMode, symbols: dict[str, torch.SymInt]) -> torch.Tensor:
    if data is None:
        raise RewriteError(f"the input {name} of its graph has no sizes")
    dtype, sizes, home = _layout(data)
    made: list[Any] = [s if isinstance(s, int) else _symbol(mode, symbols, *s) for s in sizes]
    with mode:
        return torch.empty(made, dtype=dtype, device=home)


def _example_value(data: Any, mode: FakeTensorMode) -> Any:
    if isinstance(data, list):
        return tuple(_example_value(item, mode) for item in data[:_RESULTS])
    if data is None:
        return None
    dtype, sizes, home = _layout(data)
    with mode:
        return torch.empty([size if isinstance(size, int) else size[1] for size in sizes], dtype=dtype, device=home)


def _layout(data: Any) -> tuple[torch.dtype, list[int | tuple[str, int]], torch.device]:
    """A tensor's dtype, sizes (of a dynamic one the name and the example) and device, as the file has them."""
    checked.table(data, "value", "dtype", "sizes", "device")
    dtype = decode(data["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise RewriteError(f"its graph has a tensor of dtype {checked.shown(dtype)}")
    sizes: list[int | tuple[str, int]] = []
    for size in checked.items(data["sizes"], "sizes", checked.DIMENSIONS):
        if isinstance(size, list) and len(size) == 2:
            sizes.append((checked.text(size[0], "size"), checked.size(size[1])))
        else:
            sizes.append(checked.size(size))
    return dtype, sizes, device(data["device"])


def _symbol(mode: FakeTensorMode, symbols: dict[str, torch.SymInt], name: str, example: int) -> torch.SymInt:
    """The dynamic size of this name, whose text goes no further: sizes are numbered."""
    if name not in symbols:
        assert mode.shape_env is not None
        symbols[name] = size_symbol(mode.shape_env, f"size_{len(symbols)}", example)
    return symbols[name]
