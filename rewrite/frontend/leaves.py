"""Layers of passes in a model: each call of one is kept whole in a trace, so that the layer is seen as it is.

A model that passes have worked on, grafted and captured again, has the layers that they put in, not the operators inside.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.errors import RewriteError
from rewrite.graph.meta import VALUE, WHOLE, inherit
from rewrite.graph.nodes import attribute
from rewrite.torch_private import pytree

from .calls import LeafCall, packed, record
from .skeleton import Skeleton

Kinds = Collection[type[nn.Module]]

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype)


def leaf_paths(model: nn.Module, kinds: Kinds) -> list[str]:
    """The layers of a model, by their first paths, that are of these very classes and run nothing but their forward.

    The outermost where one holds another. What is computed before each call of a layer (weight norm) is no layer's.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        plain = type(module) in kinds and "forward" not in vars(module)
        if path and plain and not any(m._forward_pre_hooks for m in module.modules()):
            found += [path] if not any(path.startswith(f"{outer}.") for outer in found) else []
    return found


def keep_leaves(model: nn.Module, paths: Collection[str]) -> None:
    """Let the calls of layers of ``model``, an isolated copy, be kept whole while it is traced."""
    grad = torch.is_grad_enabled()
    for path in paths:
        layer = model.get_submodule(path)
        layer.forward = functools.partial(_kept, path, layer.forward, grad)


def _kept(path: str, forward: Any, grad: bool, *args: Any, **kwargs: Any) -> Any:
    """One call; traced as what it computes where a region will hold it, or where an argument is a size."""
    spec, constants, places, tensors = packed((args, kwargs))
    device = tensors[0].device.type if tensors else "cpu"
    inside = torch.is_grad_enabled() != grad or torch.is_autocast_enabled(device)
    if inside or not tensors or not all(isinstance(c, _CONSTANTS) for c in constants):
        return forward(*args, **kwargs)
    call = LeafCall(spec, constants, places, path=path)
    return record(call, tensors, lambda given, named: _checked(path, forward(*given, **named)))


def _checked(path: str, outputs: Any) -> Any:
    """Outputs that ``operator.getitem`` can take apart: a tensor, or a tuple or list of tensors."""
    parts = outputs if type(outputs) in (tuple, list) else [outputs]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise RewriteError(f"{path} returns something else than tensors: a layer of a pass returns one, or a tuple of them")
    return outputs


def lift_leaf(graph: Graph, node: Node, call: LeafCall, skeleton: Skeleton, model: nn.Module) -> None:
    """Let a call of the layer stand where ``node`` stands for it; the layer goes into the skeleton, with its tensors."""
    whole = skeleton.covers([node, *node.users])
    if call.path not in skeleton.layers:
        skeleton.put(call.path, _copy(attribute(model, call.path)))
    args, kwargs = call.arguments(list(node.args[0]))  # type: ignore[arg-type]
    with graph.inserting_before(node):
        made = graph.call_module(call.path, args, kwargs)
    inherit(made, node)
    WHOLE.set(made, whole)
    assert call.output_spec is not None
    VALUE.set(made, pytree.tree_unflatten(list(VALUE.of(node)), call.output_spec))
    single = call.output_spec == pytree.tree_structure(0)
    for user in list(node.users):
        assert user.target is operator.getitem
        if single:
            user.replace_all_uses_with(made)
            graph.erase_node(user)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _copy(layer: nn.Module) -> nn.Module:
    """The layer with the tensors that it has, without the hooks on its calls: a trace holds what they do."""
    memo: dict[int, Any] = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    made = copy.deepcopy(layer, memo)
    for part in made.modules():
        part._forward_hooks.clear()
    return made
