"""Custom ``torch.autograd.Function`` calls: recorded while tracing, since their backward vanishes in an export.

While a model is traced, each call of such a function is kept whole; lifting turns its node into an ``AutogradFunction``
layer that calls the user's function, backward included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointFunction

from rewrite.graph.layers import FunctionCall
from rewrite.graph.meta import VALUE, inherit

from .calls import is_tracing, packed, record

_base_apply = torch.autograd.Function.__dict__["apply"]


def _original_apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return _base_apply.__get__(None, function)(*args)


def _traced_apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if is_tracing() and function is CheckpointFunction:
        run, _, *inputs = args
        with saved_tensors_hooks(_unchanged, _unchanged):  # noted; the function itself would run without gradient
            return run(*inputs)
    if not is_tracing() or function.__module__.startswith("torch."):
        return _base_apply.__get__(None, function)(*args, **kwargs)
    spec, constants, places, tensors = packed(args)
    call = FunctionCall(spec, constants, places, function=function)
    return record(call, tensors, lambda *given: _original_apply(function, *given))


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_HOOKS_NOTE = (
    "activation checkpointing and other hooks on saved tensors are not part of the layer graph: "
    "what stands inside is run without them"
)


@contextlib.contextmanager
def recorded_functions(notes: list[str]) -> Iterator[None]:
    """Keep custom autograd functions whole, and note activation checkpointing, while a model is traced."""
    enter = saved_tensors_hooks.__enter__

    def noted(hooks: saved_tensors_hooks) -> None:
        if _HOOKS_NOTE not in notes:
            notes.append(_HOOKS_NOTE)
        enter(hooks)

    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(_traced_apply)),
        mock.patch.object(saved_tensors_hooks, "__enter__", noted),
    ):
        yield


def call_layer(graph: Graph, node: Node, path: str) -> None:
    """Let a call of the layer at ``path`` stand where ``node`` stands for a custom autograd function."""
    tensors: Any = node.args[0]
    with graph.inserting_before(node):
        made = graph.call_module(path, tuple(tensors))
    inherit(made, node, VALUE)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
