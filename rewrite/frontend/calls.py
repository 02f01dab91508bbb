"""Calls that a trace keeps whole: each is one node of the operator ``rewrite::whole_call``, which is never run.

What a trace would look into is thereby seen as it is: an autograd function with its backward, a layer of a pass.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from rewrite.graph.layers import PackedCall
from rewrite.torch_private import pytree


class LeafInRegionError(Exception):
    """A layer is called where the graph is kept as a region, which owns no tensors; ``path`` says which."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is called in a region")
        self.path = path


@dataclass
class LeafCall(PackedCall):
    """A call of the layer at ``path``."""

    path: str = field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.path}{self.constants}{self.spec}"


@dataclass(frozen=True)
class _Kept:
    """A call, and what gives its outputs on fake tensors."""

    call: PackedCall
    run: Callable[..., Any]


_kept: ContextVar[list[_Kept] | None] = ContextVar("calls that are kept whole", default=None)


@torch.library.custom_op("rewrite::whole_call", mutates_args=())
def whole_call(tensors: list[torch.Tensor], index: int) -> list[torch.Tensor]:
    """Stands for a call in a trace; it is never run."""
    raise RuntimeError("rewrite::whole_call only exists while a model is traced")


@whole_call.register_fake
def _fake(tensors: list[torch.Tensor], index: int) -> list[torch.Tensor]:
    calls = _kept.get()
    if calls is None:
        raise RuntimeError("rewrite::whole_call only exists while a model is traced")
    call = calls[index].call
    with torch.no_grad():
        outputs = calls[index].run(*call.arguments(tensors))
    leaves, spec = pytree.tree_flatten(outputs)
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    call.output_spec, call.output_places = spec, places
    call.output_constants = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
    return [leaves[i].clone() if any(leaves[i] is t for t in tensors) else leaves[i] for i in places]


@contextlib.contextmanager
def kept_whole() -> Iterator[None]:
    """Inside, ``record`` may be used; ``attach_calls`` has to follow inside, too."""
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def is_tracing() -> bool:
    """Whether calls are kept now."""
    return _kept.get() is not None


def packed(args: Any) -> tuple[pytree.TreeSpec, tuple[Any, ...], tuple[int, ...], list[torch.Tensor]]:
    """Arguments as structure, constants, places of the tensors among the leaves, and the tensors."""
    leaves, spec = pytree.tree_flatten(args)
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    constants = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
    return spec, constants, places, [leaves[i] for i in places]


def record(call: PackedCall, tensors: list[torch.Tensor], run: Callable[..., Any]) -> Any:
    """Keep a call whole: its outputs, in their structure. ``run`` is given the arguments and computes them."""
    calls = _kept.get()
    assert calls is not None
    calls.append(_Kept(call, run))
    outputs = whole_call(tensors, len(calls) - 1)
    assert call.output_spec is not None
    merged = list(call.output_constants)
    for place, output in zip(call.output_places, outputs, strict=True):
        merged[place] = output
    return pytree.tree_unflatten(merged, call.output_spec)


def attach_calls(module: GraphModule) -> None:
    """Give each node of a trace that stands for a call the call that it is, ``meta["call"]``.

    Its serial number becomes one that follows from what is called, so that two traces of one model can be compared.
    """
    calls = _kept.get()
    assert calls is not None
    graphs = [part.graph for part in module.modules() if isinstance(part, GraphModule)]
    for node in (n for graph in graphs for n in graph.nodes):
        if node.target is torch.ops.rewrite.whole_call.default:
            tensors, index = node.args
            assert isinstance(index, int)
            call = node.meta["call"] = calls[index].call
            node.args = (tensors, zlib.crc32(call.name.encode()))
