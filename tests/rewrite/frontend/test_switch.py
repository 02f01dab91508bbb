"""Regions of a training and an evaluation graph, where the alignment is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.frontend.align import Alignment, Chunk
from rewrite.frontend.switch import switch_modes

aten = torch.ops.aten


def _graph(which: int) -> tuple[Graph, dict[str, Node]]:
    """Both reshape to a size of one of two inputs and, later, slice by the negative of it."""
    graph, value = Graph(), torch.zeros(3, 4)
    inputs = [graph.placeholder(name) for name in "xy"]
    size = graph.call_function(aten.sym_size.int, (inputs[which], 1))
    view = graph.call_function(aten.reshape.default, (inputs[0], [-1, size]))
    negative = graph.call_function(aten.mul.Scalar, (size, -1))
    part = graph.call_function(aten.slice.Tensor, (view, 1, negative))
    graph.output((part,))
    for node in (*inputs, view, part):
        node.meta["val"] = value
    size.meta["val"], negative.meta["val"] = 4, -4
    return graph, {"size": size, "view": view, "negative": negative, "part": part}


def test_what_a_region_gives_is_used_before_a_size_that_it_takes() -> None:
    (train, ours), (evaluation, theirs) = _graph(0), _graph(1)
    chunk = Chunk(0, 0, 0, 0)
    chunk.uses += [
        (ours["view"], 2, chunk.switch(ours["size"], theirs["size"])),
        (ours["part"], 2, chunk.switch(ours["negative"], theirs["negative"])),
    ]
    placed: list[nn.Module] = []

    def place(nodes: Sequence[Node], name: str, region: nn.Module) -> str:
        placed.append(region)
        return name

    switch_modes(train, evaluation, Alignment({ours[n]: theirs[n] for n in ("view", "part")}, [chunk]), place)
    train.lint()
    order = [node.name for node in train.nodes]
    (call,) = train.find_nodes(op="call_module", target="branch")
    assert order.index(ours["negative"].name) < order.index(call.name) < order.index(ours["view"].name)
    assert len(placed) == 1
