"""From an export's graph to one flat ATen graph: assertions dropped, ``no_grad`` and ``autocast`` regions inlined.

A node that stood inside such a region carries ``meta["contexts"]``, the tuple of contexts around it, outermost first;
grouping turns them back into regions once the graph is aligned.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from rewrite.graph.nodes import aten, is_differentiable_leaf, is_pure, mutated_arguments
from rewrite.torch_private import OpOverload

from .contexts import ContextUse
from .decisions import is_decision
from .dropouts import forget_aliases

_ASSERTIONS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_functional_assert_async",
)
_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def flatten(module: GraphModule) -> None:
    """Flatten ``module.graph`` in place."""
    serial = itertools.count()
    _drop_assertions(module.graph)
    while _inline_one(module, serial):
        pass
    forget_aliases(module.graph)
    _drop_idle_copies(module.graph)
    _forget_harmless_no_grad(module)
    drop_dead(module.graph)


def _drop_assertions(graph: Graph) -> None:
    for node in reversed(graph.nodes):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        asserts = node.op == "call_function" and _packet_name(node.target) in _ASSERTIONS and not is_decision(node)
        if guard or (asserts and not node.users):
            graph.erase_node(node)


def _drop_idle_copies(graph: Graph) -> None:
    """Drop ``copy_(buffer, value)`` where the value is the buffer itself, written in place: export adds these."""
    for node in list(graph.nodes):
        if node.target is aten.copy_.default and not node.users:
            source: Any = node.args[1]
            while isinstance(source, Node) and mutated_arguments(source):
                source = mutated_arguments(source)[0]
            if source is node.args[0]:
                graph.erase_node(node)


def _packet_name(target: Any) -> str:
    return target._overloadpacket.__name__ if isinstance(target, OpOverload) else ""


def _inline_one(module: GraphModule, serial: Any) -> bool:
    """Inline the regions that stand in the graph now; True if there were any (they may hold further ones)."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target in (_NO_GRAD, _AUTOCAST)]
    for node in nodes:
        if node.target is _NO_GRAD:
            kind, settings, callee, operands = "grad", (node.args[0],), node.args[1], node.args[2:]
        else:
            kind, settings, callee, operands = "autocast", node.args[:4], node.args[4], node.args[5:]
        body = module.get_submodule(str(callee.target))
        assert isinstance(body, GraphModule)
        _drop_assertions(body.graph)
        use = ContextUse(kind, tuple(settings), next(serial))
        outer = node.meta.get("contexts", ())
        _inline(module.graph, node, body, operands, (*outer, use), f"{callee.target}.")
        if not callee.users:
            module.graph.erase_node(callee)
    return bool(nodes)


def _inline(
    graph: Graph, call: Node, body: GraphModule, operands: tuple[Any, ...], contexts: tuple[ContextUse, ...], prefix: str
) -> None:
    values: dict[Node, Any] = {}
    inputs = iter(operands)
    outputs: Any = ()
    with graph.inserting_before(call):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = next(inputs)
            elif inner.op == "output":
                outputs = torch.fx.map_arg(inner.args[0], lambda n: values[n])
            else:
                made = graph.node_copy(inner, lambda n: values[n])
                if made.op == "get_attr":
                    made.target = prefix + str(inner.target)
                else:
                    made.meta["contexts"] = contexts
                values[inner] = made
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"{call.name} is used whole by {user.name}")
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(call)


def _forget_harmless_no_grad(module: GraphModule) -> None:
    """Drop grad contexts around values that cannot require grad (rotary tables), and those that enable grad."""
    tracked: dict[Node, bool] = {}
    blocks: dict[ContextUse, list[Node]] = {}
    for node in module.graph.nodes:
        contexts = node.meta.get("contexts", ())
        blocked = any(c.kind == "grad" and not c.settings[0] for c in contexts)
        reaches = any(tracked[n] for n in node.all_input_nodes)
        tracked[node] = not blocked and is_differentiable_leaf(module, node, reaches)
        for context in contexts:
            if context.kind == "grad":
                blocks.setdefault(context, []).append(node)
    for context, nodes in blocks.items():
        inside = set(nodes)
        enters = any(tracked[n] for node in nodes for n in node.all_input_nodes if n not in inside)
        mutates = any(not is_pure(node) for node in nodes)
        if context.settings[0] or not (enters or mutates):
            for node in nodes:
                node.meta["contexts"] = tuple(c for c in node.meta["contexts"] if c is not context)


def drop_dead(graph: Graph, keep: Callable[[Node], bool] = lambda node: False) -> None:
    """Erase unused nodes that have no effect: neither mutate, nor draw random numbers, nor call a layer."""
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node) and node.op not in ("placeholder", "output") and not keep(node):
            graph.erase_node(node)
