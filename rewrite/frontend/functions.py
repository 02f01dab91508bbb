"""Custom ``torch.autograd.Function`` calls: recorded while tracing, since their backward vanishes in an export.

While a model is traced, each call of such a function becomes one node of the operator ``rewrite::autograd_function``;
lifting turns the node into an ``AutogradFunction`` layer that calls the user's function, backward included.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointFunction

from rewrite.graph.layers import FunctionCall
from rewrite.torch_private import pytree

_calls: ContextVar[list[FunctionCall] | None] = ContextVar("calls of custom autograd functions", default=None)


@torch.library.custom_op("rewrite::autograd_function", mutates_args=())
def autograd_function(tensors: list[torch.Tensor], index: int) -> list[torch.Tensor]:
    """Stands for a custom autograd function in a trace; it is never run."""
    raise RuntimeError("rewrite::autograd_function only exists while a model is traced")


@autograd_function.register_fake
def _fake(tensors: list[torch.Tensor], index: int) -> list[torch.Tensor]:
    calls = _calls.get()
    if calls is None:
        raise RuntimeError("rewrite::autograd_function only exists while a model is traced")
    call = calls[index]
    with torch.no_grad():
        outputs = _original_apply(call.function, *call.arguments(tensors))
    leaves, spec = pytree.tree_flatten(outputs)
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    call.output_spec, call.output_places = spec, places
    call.output_constants = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
    return [leaves[i].clone() if any(leaves[i] is t for t in tensors) else leaves[i] for i in places]


_base_apply = torch.autograd.Function.__dict__["apply"]


def _original_apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return _base_apply.__get__(None, function)(*args)


def _traced_apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    calls = _calls.get()
    if calls is not None and function is CheckpointFunction:
        run, _, *inputs = args
        with saved_tensors_hooks(_unchanged, _unchanged):  # noted; the function itself would run without gradient
            return run(*inputs)
    if calls is None or function.__module__.startswith("torch."):
        return _base_apply.__get__(None, function)(*args, **kwargs)
    leaves, spec = pytree.tree_flatten(args)
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    constants = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
    call = FunctionCall(function, spec, constants, places)
    calls.append(call)
    outputs = autograd_function([leaves[i] for i in places], len(calls) - 1)
    assert call.output_spec is not None
    merged = list(call.output_constants)
    for place, output in zip(call.output_places, outputs, strict=True):
        merged[place] = output
    return pytree.tree_unflatten(merged, call.output_spec)


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_HOOKS_NOTE = (
    "activation checkpointing and other hooks on saved tensors are not part of the layer graph: "
    "what stands inside is run without them"
)


@contextlib.contextmanager
def recorded_functions(notes: list[str]) -> Iterator[list[FunctionCall]]:
    """Record custom autograd functions, and note activation checkpointing, while a model is traced."""
    calls: list[FunctionCall] = []
    token = _calls.set(calls)
    enter = saved_tensors_hooks.__enter__

    def noted(hooks: saved_tensors_hooks) -> None:
        if _HOOKS_NOTE not in notes:
            notes.append(_HOOKS_NOTE)
        enter(hooks)

    try:
        with (
            mock.patch.object(torch.autograd.Function, "apply", classmethod(_traced_apply)),
            mock.patch.object(saved_tensors_hooks, "__enter__", noted),
        ):
            yield calls
    finally:
        _calls.reset(token)


def attach_calls(module: GraphModule, calls: list[FunctionCall]) -> None:
    """Give each node of a trace that stands for a custom autograd function the call that it is, ``meta["call"]``.

    Its serial number becomes one that follows from the function, so that two traces of one model can be compared.
    """
    graphs = [part.graph for part in module.modules() if isinstance(part, GraphModule)]
    for node in (n for graph in graphs for n in graph.nodes):
        if node.target is torch.ops.rewrite.autograd_function.default:
            tensors, index = node.args
            assert isinstance(index, int)
            call = node.meta["call"] = calls[index]
            node.args = (tensors, zlib.crc32(f"{call.function.__module__}.{call.function.__qualname__}".encode()))


def call_layer(graph: Graph, node: Node, path: str) -> None:
    """Let a call of the layer at ``path`` stand where ``node`` stands for a custom autograd function."""
    tensors: Any = node.args[0]
    with graph.inserting_before(node):
        made = graph.call_module(path, tuple(tensors))
    made.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
    node.replace_all_uses_with(made)
    graph.erase_node(node)
