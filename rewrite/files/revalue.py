"""FakeTensor values for the nodes of a graph that was read from a file."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from rewrite.graph.export import quiet
from rewrite.graph.fakes import Fakes, fake_value
from rewrite.graph.nodes import attribute
from rewrite.graph.program import LayerGraph
from rewrite.torch_private import FakeTensorMode, ShapeEnv, size_symbol

from .values import decode


def revalue(module: LayerGraph, graph: Graph) -> None:
    """Give every node its FakeTensor value again, from the sizes that the file names."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols: dict[str, torch.SymInt] = {}
    with quiet():
        _propagate(module, graph, mode, symbols)


def _propagate(module: LayerGraph, graph: Graph, mode: FakeTensorMode, symbols: dict[str, torch.SymInt]) -> None:
    known: Fakes = {}
    for node in graph.nodes:
        written = node.meta.pop("file_value", None)
        if node.op == "placeholder":
            node.meta["val"] = _input_value(written, mode, symbols)
        elif node.op == "get_attr":
            value = attribute(module, str(node.target))
            if isinstance(value, torch.Tensor):
                node.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
        elif node.op != "output":
            try:
                node.meta["val"] = fake_value(module, node, known=known)
            except Exception:  # operators that dynamic sizes defeat, as recurrent ones do: the example's sizes then
                if written is None:
                    raise
                node.meta["val"] = _example_value(written, mode)


def _input_value(data: Any, mode: FakeTensorMode, symbols: dict[str, torch.SymInt]) -> torch.Tensor:
    dtype = decode(data["dtype"])
    assert mode.shape_env is not None
    sizes: list[Any] = []
    for size in data["sizes"]:
        if isinstance(size, int):
            sizes.append(size)
            continue
        name, example = size
        if name not in symbols:
            symbols[name] = size_symbol(mode.shape_env, name, example)
        sizes.append(symbols[name])
    with mode:
        return torch.empty(sizes, dtype=dtype, device=data["device"])


def _example_value(data: Any, mode: FakeTensorMode) -> Any:
    if isinstance(data, list):
        return tuple(_example_value(item, mode) for item in data)
    sizes = [size if isinstance(size, int) else size[1] for size in data["sizes"]]
    with mode:
        return torch.empty(sizes, dtype=decode(data["dtype"]), device=data["device"])
