"""The only way to change a graph. Every change is journaled, keeps metadata and values, and says where it came from.

An editor works on a program of its own (``apply`` clones before a pass). Tensors are never written in place: a changed
parameter is a new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import Argument

from rewrite.errors import RewriteError
from rewrite.torch_private import pytree

from . import meta
from .fakes import fake_value
from .nodes import attribute
from .program import Container, Program
from .tree import Places

Kind = Literal["replace layer", "insert", "remove", "rewire", "set parameter"]


@dataclass(frozen=True)
class Change:
    """One change of a program: what was done, to which node and path, and the layer that stood there before.

    ``nodes`` are the names of all nodes that it touched: the calls of a replaced layer, the users that were rewired.
    """

    kind: Kind
    path: str
    node: str
    detail: str
    old: nn.Module | None = None
    new: nn.Module | None = None
    nodes: tuple[str, ...] = ()


class Editor:
    """Changes one program on behalf of one pass."""

    def __init__(self, program: Program, author: str) -> None:
        self.program = program
        self.author = author
        self.changes: list[Change] = []
        self.graph = program.graph
        self._places = Places(program.module)
        self._calls = Calls(program.graph)
        self._numbers: Counter[str] = Counter()

    def replace_layer(self, path: str, layer: nn.Module, calls: Sequence[Node] | None = None) -> None:
        """Replace the layer at ``path`` by ``layer``, for all its calls or for some.

        Where only some ``calls`` are replaced, the others keep the old layer and these get ``layer`` at a path of its
        own beside it. Children of the old layer stay below the new one: they are layers of their own.

        Raises RewriteError if the new layer's output differs in shape or dtype from the old one's; nothing is changed then.
        """
        old = attribute(self.program.module, path)
        if not isinstance(old, nn.Module):
            raise RewriteError(f"there is no layer at {path}")
        every = self._calls.of(path)
        calls = every if calls is None else list(calls)
        values = [self._checked(node, layer) for node in calls]
        layer.train(old.training)
        for name, child in old._modules.items():
            layer._modules.setdefault(name, child)
        target = path if len(calls) == len(every) else self._beside(path)
        self._put(target, layer)
        for node, value in zip(calls, values, strict=True):
            self._calls.move(node, target)
            meta.VALUE.set(node, value)
            self._sign(node, [node])
        names = tuple(n.name for n in calls)
        self._note("replace layer", target, ", ".join(names), f"{_kind(old)} -> {_kind(layer)}", names, old, layer)

    def insert_layer(self, path: str, layer: nn.Module, inputs: Sequence[Argument], *, after: Node) -> Node:
        """Call a new layer at a free ``path`` on ``inputs``, right after a node; the node of its value."""
        self._put(self._free(path), layer)
        with self.graph.inserting_after(after):
            made = self.graph.call_module(path, tuple(inputs))
        return self._inserted(made, after, f"{_kind(layer)} at {path}", layer)

    def insert_function(
        self,
        target: Callable[..., Any],
        args: Sequence[Argument],
        kwargs: Mapping[str, Argument] | None = None,
        *,
        after: Node,
    ) -> Node:
        """Call a function (an ATen overload) on ``args``, right after a node; the node of its value."""
        with self.graph.inserting_after(after):
            made = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        return self._inserted(made, after, str(target), None)

    def rewire(self, old: Node, new: Node, users: Callable[[Node], bool] = lambda user: True) -> None:
        """Let the users of ``old`` (those that ``users`` accepts) use ``new`` instead."""
        changed = old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and users(user))
        self._sign(new, [old])
        if changed:
            self._note("rewire", "", new.name, f"{len(changed)} uses of {old.name}", tuple(n.name for n in changed))

    def remove(self, node: Node) -> None:
        """Remove a node that nothing uses. Raises RewriteError if something does."""
        if node.users:
            raise RewriteError(f"{node.name} is still used by {', '.join(u.name for u in node.users)}")
        path = str(node.target) if node.op == "call_module" else ""
        self._calls.drop(node)
        self.graph.erase_node(node)
        self._note("remove", path, node.name, "", (node.name,))

    def set_parameter(self, path: str, value: torch.Tensor) -> None:
        """Give the parameter or buffer at ``path`` a new tensor; all places that share it get the new one."""
        parent, _, name = path.rpartition(".")
        holder = attribute(self.program.module, parent) if parent else self.program.module
        kinds: list[dict[str, Any]] = [holder._parameters, holder._buffers] if isinstance(holder, nn.Module) else []
        held = next((h for h in kinds if h.get(name) is not None), {})
        old = held.get(name)
        if old is None:
            raise RewriteError(f"there is no parameter or buffer {path}")
        new = value.detach().clone()
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        self._places.set(held, name, new)
        self._note("set parameter", path, "", f"{tuple(old.shape)} -> {tuple(new.shape)}")

    def value_of(self, node: Node) -> Any:
        """The FakeTensor value of a node, computed from those of its inputs."""
        return fake_value(self.program.module, node, known=self.program.module.shapes)

    def _inserted(self, made: Node, near: Node, detail: str, layer: nn.Module | None) -> Node:
        self._calls.add(made)
        meta.inherit(made, near)
        meta.VALUE.set(made, self.value_of(made))
        self._sign(made, [near])
        path = str(made.target) if made.op == "call_module" else ""
        self._note("insert", path, made.name, detail, (made.name,), None, layer)
        return made

    def _note(
        self,
        kind: Kind,
        path: str,
        node: str,
        detail: str,
        nodes: tuple[str, ...] = (),
        old: nn.Module | None = None,
        new: nn.Module | None = None,
    ) -> None:
        self.changes.append(Change(kind, path, node, detail, old, new, nodes))

    def _checked(self, node: Node, layer: nn.Module) -> Any:
        """The value of a node if it called ``layer``, which must have the shape and dtype that it has now."""
        value = fake_value(self.program.module, node, known=self.program.module.shapes, layer=layer)
        old, new = _shapes(meta.VALUE.of(node)), _shapes(value)
        if old != new:
            raise RewriteError(f"the new layer at {node.target} gives {new} where the old one gave {old}")
        return value

    def _sign(self, node: Node, sources: Sequence[Node]) -> None:
        mark: meta.Mark = {"pass": self.author, "from": tuple(s.name for s in sources)}
        meta.PROVENANCE.set(node, (*meta.PROVENANCE.of(node), mark))

    def _beside(self, path: str) -> str:
        while True:
            self._numbers[path] += 1
            beside = f"{path}_{self._numbers[path]}"
            if not self._exists(beside):
                return beside

    def _free(self, path: str) -> str:
        if self._exists(path):
            raise RewriteError(f"there is a module at {path} already")
        return path

    def _exists(self, path: str) -> bool:
        parent, _, name = path.rpartition(".")
        holder = attribute(self.program.module, parent) if parent else self.program.module
        return holder is not None and hasattr(holder, name)

    def _put(self, path: str, layer: nn.Module) -> None:
        holder: nn.Module = self.program.module
        *parents, name = path.split(".")
        for part in parents:
            if part not in holder._modules:
                self._places.put(holder, part, Container().train(holder.training))
            found = holder._modules[part]
            assert found is not None
            holder = found
        self._places.put(holder, name, layer)


class Calls:
    """The calls of each path in a graph, in execution order, kept up to date by the edits."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._count = -1
        self._of: dict[str, dict[Node, None]] = {}

    def of(self, path: str) -> list[Node]:
        """The nodes that call ``path``."""
        if self._count != len(self._graph.nodes):  # nodes came or went past the editor
            self._index()
        return [n for n in self._of.get(path, ()) if n.target == path]

    def add(self, node: Node) -> None:
        """A node came."""
        self._count += 1
        if node.op == "call_module":
            self._of.setdefault(str(node.target), {})[node] = None

    def drop(self, node: Node) -> None:
        """A node is about to go."""
        self._count -= 1
        self._of.get(str(node.target), {}).pop(node, None)

    def move(self, node: Node, path: str) -> None:
        """Let a node call another path."""
        self._of.get(str(node.target), {}).pop(node, None)
        node.target = path
        self._of.setdefault(path, {})[node] = None

    def _index(self) -> None:
        self._count = len(self._graph.nodes)
        self._of = {}
        for node in self._graph.nodes:
            if node.op == "call_module":
                self._of.setdefault(str(node.target), {})[node] = None


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda v: (tuple(str(s) for s in v.shape), v.dtype) if isinstance(v, torch.Tensor) else v, value)
