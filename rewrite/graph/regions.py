"""Regions: layers that own a captured subgraph, and carving them out of a flat graph.

A region takes every tensor it needs, parameters included, as an argument, so that state_dict keys stay where they are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from .codegen import compile_graph, copy_graph


class Region(nn.Module):
    """A part of the model kept whole: its captured subgraph, one for each mode where the modes differ.

    ``graphs`` holds ``{"any": graph}`` or ``{"train": graph, "eval": graph}``; ``contexts`` are entered around it.
    """

    graphs: Mapping[str, Graph]

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        reason: str,
        contexts: Sequence[tuple[str, tuple[Any, ...]]] = (),
        layers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.reason = reason
        self.contexts = tuple(contexts)
        for name, layer in (layers or {}).items():
            self.add_module(name, layer)
        self.__dict__["graphs"] = dict(graphs)
        self.recompile()

    def recompile(self) -> None:
        """Generate the callables anew from the graphs."""
        self.__dict__["runs"] = {mode: compile_graph(graph)[0] for mode, graph in self.graphs.items()}

    def forward(self, *inputs: Any) -> Any:
        runs: dict[str, Callable[..., Any]] = self.__dict__["runs"]
        run = runs["any"] if "any" in runs else runs["train" if self.training else "eval"]
        if not self.contexts:
            return run(self, *inputs)
        device = next((v.device.type for v in inputs if isinstance(v, torch.Tensor)), "cpu")
        with contextlib.ExitStack() as stack:
            for kind, settings in self.contexts:
                stack.enter_context(_enter(kind, settings, device))
            return run(self, *inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        nn.Module.__init__(made)
        for key, value in self.__dict__.items():
            if key == "graphs":
                made.__dict__[key] = {mode: copy_graph(graph) for mode, graph in value.items()}
            elif key != "runs":
                made.__dict__[key] = copy.deepcopy(value, memo)
        made.recompile()
        return made

    def extra_repr(self) -> str:
        return self.reason


def _enter(kind: str, settings: tuple[Any, ...], device: str) -> contextlib.AbstractContextManager[Any]:
    if kind == "grad":
        return torch.set_grad_enabled(settings[0])
    _, dtype, enabled, cache = settings
    if not enabled and not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()  # the meta device has no autocast, so it is off
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
