"""Literals that a capture baked and that must follow at run time: devices the inputs, dtypes the model.

A dtype literal cannot be told from a fixed one in a single capture: ``x.to(torch.float32)`` and ``x.to(weight.dtype)``
look alike in float32. Two captures of the model, in two dtypes, tell them apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from rewrite.graph.nodes import (
    aten,
    call_arguments,
    is_floating,
    leaves,
    map_leaves,
    overload,
    set_argument,
    tensor_value,
)
from rewrite.graph.ops import device_of, dtype_limit, dtype_of, limit_name

from .casts import cast_nodes, is_cast, is_item
from .flatten import drop_dead


@dataclass(frozen=True)
class Follows:
    """In a merged cast chain: the dtype is that of the model's tensors that had ``dtype`` at capture."""

    dtype: torch.dtype


Step = torch.dtype | Follows


def follow_devices(graph: Graph) -> None:
    """Replace every device literal by the device of the first tensor input (or parameter)."""
    anchor = _anchor(graph)
    if anchor is None:
        return
    device: Node | None = None
    for node in list(graph.nodes):
        if node.op != "call_function" or not any(isinstance(v, torch.device) for v in _literals(node)):
            continue
        if device is None:
            with graph.inserting_before(_first_call(graph)):
                device = graph.call_function(device_of, (anchor,))
            device.meta["val"] = anchor.meta["val"].device
        for name, value in call_arguments(node).items():
            if isinstance(value, torch.device):
                set_argument(node, name, device)


def _literals(node: Node) -> list[Any]:
    return [*leaves(node.args), *leaves(dict(node.kwargs))]


def _anchor(graph: Graph) -> Node | None:
    tensors = [n for n in graph.nodes if n.op in ("placeholder", "get_attr") and tensor_value(n) is not None]
    inputs = [n for n in tensors if n.op == "placeholder"]
    found = inputs or tensors
    return found[0] if found else None


def _first_call(graph: Graph) -> Node:
    first: Node = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    return first


def drop_idle_casts(graph: Graph) -> None:
    """Drop the casts that change nothing: a capture attributes later uses of the value to them."""
    for node in list(graph.nodes):
        if is_cast(node):
            before, after = tensor_value(node.args[0]), tensor_value(node)
            assert before is not None
            assert after is not None
            if before.dtype == after.dtype:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def follow_dtypes(
    graph: Graph, partner: Mapping[Node, Node], other: Graph, dtypes: Mapping[torch.dtype, torch.dtype]
) -> None:
    """Make dtype literals that follow the model's dtype follow it, by the partners of nodes in the other capture.

    ``dtypes`` says which dtype each of the model's dtypes is in the other capture. Casts that only one of the two
    captures needed are put where its graph has them.
    """
    _Follower(graph, partner, dtypes).run(other)
    drop_dead(graph)


class _Follower:
    def __init__(self, graph: Graph, partner: Mapping[Node, Node], dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
        self.graph, self.partner, self.dtypes = graph, dict(partner), dtypes
        self.natives = {other: dtype for dtype, other in dtypes.items()}
        self.inverse: dict[Node, Node] = {}
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        for ours, theirs in self.partner.items():
            self.inverse.setdefault(theirs, ours)
        self.casts: dict[tuple[Node, Any, Node], Node] = {}
        self.barren: dict[torch.dtype, set[Node]] = {}  # nothing upstream of these follows the dtype
        self.fallbacks: dict[torch.dtype, Node | None] = {}

    def run(self, other: Graph) -> None:
        named = {(n.op, n.target): n for n in _sources(other)}
        for ours in _sources(self.graph):
            theirs = named.get((ours.op, ours.target))
            if theirs is not None:
                self.partner[ours] = theirs
                self.inverse[theirs] = ours
        self.partner[self.graph.output_node()] = other.output_node()
        for node in list(self.graph.nodes):
            theirs = self.partner.get(node)
            if theirs is not None and (is_item(node) or node.op == "output"):
                self._casts_into(node, theirs)
                self._literals(node, theirs)

    def _casts_into(self, node: Node, theirs: Node) -> None:
        right = iter([*leaves(theirs.args), *leaves(dict(theirs.kwargs))])

        def change(value: Any) -> Any:
            other = next(right, None)
            if not isinstance(value, Node) or not is_floating(value) or not isinstance(other, Node):
                return value
            base, chain = cast_nodes(value)
            other_base, other_chain = cast_nodes(other)
            merged = self._merged(_dtypes(chain), _dtypes(other_chain))
            return self._cast(base, merged, other_base, node, chain or other_chain)

        node.args = map_leaves(node.args, change)
        node.kwargs = map_leaves(dict(node.kwargs), change)

    def _merged(self, chain: Sequence[torch.dtype], other: Sequence[torch.dtype]) -> tuple[Step, ...]:
        """One chain of casts for both captures."""
        if not other:
            return tuple(Follows(d) if d in self.dtypes else d for d in chain)
        if not chain:
            return tuple(Follows(self.natives[d]) if d in self.natives else d for d in other)
        if len(chain) == len(other):
            return tuple(Follows(a) if self.dtypes.get(a) is b else a for a, b in zip(chain, other, strict=True))
        return tuple(chain)

    def _cast(self, base: Node, chain: tuple[Step, ...], other_base: Node, user: Node, models: Sequence[Node]) -> Node:
        """The chain of casts before ``user``, each one for one of the casts ``models`` of a capture, in its module call.

        Two casts of one value stay two: each rounds its own part of the gradient.
        """
        value = base
        for dtype, model in zip(chain, models, strict=True):
            contexts = user.meta.get("contexts", ())
            key = (value, contexts, model)
            made = self.casts.get(key)
            if made is None:
                with self.graph.inserting_before(user):
                    made = self._cast_node(value, dtype, other_base)
                made.meta["nn_module_stack"] = model.meta.get("nn_module_stack") or {}
                if contexts:
                    made.meta["contexts"] = contexts
                self.casts[key] = made
            value = made
        return value

    def _cast_node(self, value: Node, step: Step, other_base: Node) -> Node:
        fake = value.meta["val"]
        dtype = step.dtype if isinstance(step, Follows) else step
        reference = self._reference(other_base, dtype) if isinstance(step, Follows) else None
        if reference is None:
            made = self.graph.call_function(aten.to.dtype, (value, dtype))
        else:
            made = self.graph.call_function(aten.to.other, (value, reference))
        made.meta["val"] = fake.to(dtype)
        return made

    def _reference(self, start: Node, dtype: torch.dtype) -> Node | None:
        """The nearest value upstream that follows ``dtype`` in both captures; else a parameter, else an input."""
        barren = self.barren.setdefault(dtype, set())
        queue, seen = deque([start] if start not in barren else []), {start}
        while queue:
            theirs = queue.popleft()
            value = tensor_value(theirs)
            ours = self.inverse.get(theirs)
            if value is not None and value.dtype is self.dtypes[dtype] and ours is not None and _has(ours, dtype):
                return ours
            for source in theirs.all_input_nodes:
                if source not in seen and source not in barren:
                    seen.add(source)
                    queue.append(source)
        barren |= seen
        return self._fallback(dtype)

    def _beside(self, node: Node, dtype: torch.dtype) -> Node | None:
        """For a tensor made from nothing: a value that it meets in an operator, computed before it."""
        for user in node.users:
            for source in user.all_input_nodes:
                if source.op != "get_attr" and _has(source, dtype) and self.order.get(source, 1 << 60) < self.order[node]:
                    return source
        return None

    def _fallback(self, dtype: torch.dtype) -> Node | None:
        if dtype not in self.fallbacks:
            sources = [n for n in _sources(self.graph) if _has(n, dtype)]
            self.fallbacks[dtype] = next((n for n in sources if n.op == "get_attr"), sources[0] if sources else None)
        return self.fallbacks[dtype]

    def _literals(self, node: Node, theirs: Node) -> None:
        if overload(node) is None or overload(theirs) is None:
            return
        others = call_arguments(theirs)
        for name, value in call_arguments(node).items():
            theirs_value = others.get(name)
            if isinstance(value, torch.dtype) and value in self.dtypes and theirs_value is self.dtypes[value]:
                self._replace(node, name, dtype_of, theirs, value)
            elif isinstance(value, float) and isinstance(theirs_value, float) and value != theirs_value:
                for dtype, other in self.dtypes.items():
                    limit = limit_name(value, dtype)
                    if limit is not None and limit == limit_name(theirs_value, other):
                        self._replace(node, name, dtype_limit, theirs, dtype, limit)
                        break

    def _replace(self, node: Node, name: str, function: Any, theirs: Node, dtype: torch.dtype, *extra: Any) -> None:
        upstream = [n for n in theirs.all_input_nodes if is_floating(n)]
        reference = self._reference(upstream[0], dtype) if upstream else self._beside(node, dtype) or self._fallback(dtype)
        if reference is None:
            return
        with self.graph.inserting_before(node):
            made = self.graph.call_function(function, (reference, *extra))
        made.meta["val"] = function(reference.meta["val"], *extra)
        if "contexts" in node.meta:
            made.meta["contexts"] = node.meta["contexts"]
        made.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        set_argument(node, name, made)


def _has(node: Node, dtype: torch.dtype) -> bool:
    value = tensor_value(node)
    return value is not None and value.dtype is dtype


def _dtypes(casts: Sequence[Node]) -> tuple[torch.dtype, ...]:
    return tuple(cast.meta["val"].dtype for cast in casts)


def _sources(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
