"""Calls of the user's own modules in a graph: the nodes of each, what flows into it and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node

from rewrite.errors import RewriteError

from . import meta
from .nodes import module_stack, tensor_value


@dataclass(frozen=True)
class ModuleCall:
    """One call of the module at ``path``: its nodes in order, tensors that it is given, and those that others read of it."""

    path: str
    key: str
    nodes: tuple[Node, ...]
    sources: tuple[Node, ...]
    results: tuple[Node, ...]

    @property
    def stack(self) -> dict[str, tuple[str, object]]:
        """The module calls around its nodes, itself the innermost."""
        every = list(meta.STACK.of(self.nodes[0]).items())
        depth = next(i for i, (key, _) in enumerate(every) if key == self.key)
        return dict(every[: depth + 1])

    def single(self) -> tuple[Node, Node]:
        """The one tensor that it is given and the one that it gives; RewriteError, by name, where they are not one."""
        for words, found in (("is given", self.sources), ("gives", self.results)):
            if len(found) != 1:
                names = ", ".join(n.name for n in found) or "none"
                raise RewriteError(f"the module at {self.path} {words} {len(found)} tensors ({names}), not one")
        return self.sources[0], self.results[0]


def module_calls(graph: Graph, path: str) -> list[ModuleCall]:
    """Every call of the user's module at ``path``, in execution order."""
    inside: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for key, own, _ in module_stack(node):
            if own == path and node.op != "placeholder":
                inside.setdefault(key, []).append(node)
    return [_call(path, key, nodes) for key, nodes in inside.items()]


def _call(path: str, key: str, nodes: list[Node]) -> ModuleCall:
    own = set(nodes)
    sources = dict.fromkeys(s for n in nodes for s in _given(n) if s not in own)
    results = [n for n in nodes if any(user not in own for user in n.users)]
    return ModuleCall(path, key, tuple(nodes), tuple(sources), tuple(results))


def _given(node: Node) -> Iterator[Node]:
    """The tensors among a node's inputs that are data: neither parameters nor sizes."""
    yield from (n for n in node.all_input_nodes if n.op != "get_attr" and tensor_value(n) is not None)
