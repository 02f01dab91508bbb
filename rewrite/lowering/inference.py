"""A program for inference: in evaluation mode, without what is there for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rewrite.graph.nodes import attribute
from rewrite.graph.properties import known
from rewrite.graph.tree import Places

if TYPE_CHECKING:
    from rewrite.graph.program import LayerGraph, Program


def evaluated(program: Program, *, share: bool = False) -> LayerGraph:
    """A copy of the program's module for inference; the program is left as it is, its tensors are shared on demand.

    Properties that are for training are gone. A layer that trains by an operator of its own says in ``plain()`` which layer
    has the same forward, bit for bit, in plain operators; that one stands in its place.
    """
    module = program.clone(share=share).module.eval()
    _use_plain(module)
    module.assume({name: value for name, value in module.properties.items() if known(name).inference})
    return module


def _use_plain(module: LayerGraph) -> None:
    places = Places(module)
    done: set[str] = set()
    for path, layer in list(module.named_modules()):
        make = getattr(type(layer), "plain", None)
        if not callable(make) or any(path.startswith(f"{outer}.") for outer in done):
            continue
        made: nn.Module = make(layer).eval()
        inside = set(made.modules())
        for name, child in layer._modules.items():
            if child not in inside:  # the graph may call it by itself
                made._modules.setdefault(name, child)
        parent, _, name = path.rpartition(".")
        places.put(attribute(module, parent) if parent else module, name, made)
        done.add(path)
