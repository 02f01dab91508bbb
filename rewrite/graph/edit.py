"""The only way to change a graph. Every change is journaled, keeps metadata and values, and says where it came from.

An editor works on a program of its own (``apply`` clones before a pass). Tensors are never written in place: a changed
parameter is a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import Argument

from rewrite.errors import RewriteError
from rewrite.torch_private import pytree

from .fakes import Fakes, fake_value
from .nodes import attribute
from .program import Container, Program
from .tree import holders

Kind = Literal["replace layer", "insert", "remove", "rewire", "set parameter"]
_KEPT_META = ("nn_module_stack", "stack_trace", "whole")


@dataclass(frozen=True)
class Change:
    """One change of a program: what was done, to which node and path, and the layer that stood there before."""

    kind: Kind
    path: str
    node: str
    detail: str
    old: nn.Module | None = None
    new: nn.Module | None = None


class Editor:
    """Changes one program on behalf of one pass."""

    def __init__(self, program: Program, author: str) -> None:
        self.program = program
        self.author = author
        self.changes: list[Change] = []
        self.graph = program.graph
        self.holders = holders(program.module)
        self._fakes: Fakes = {}

    def replace_layer(self, path: str, layer: nn.Module, calls: Sequence[Node] | None = None) -> None:
        """Replace the layer at ``path`` by ``layer``, for all its calls or for some.

        Where only some ``calls`` are replaced, the others keep the old layer and these get ``layer`` at a path of its
        own beside it. Children of the old layer stay below the new one: they are layers of their own.

        Raises RewriteError if the new layer's output differs in shape or dtype from the old one's.
        """
        every = [n for n in self.graph.nodes if n.op == "call_module" and n.target == path]
        calls = every if calls is None else list(calls)
        old: nn.Module = attribute(self.program.module, path)
        layer.train(old.training)
        for name, child in old._modules.items():
            layer._modules.setdefault(name, child)
        target = path if len(calls) == len(every) else self._beside(path)
        self._put(target, layer)
        for node in calls:
            node.target = target
            self._check_value(node, self.value_of(node))
            self._sign(node, [node])
        detail = f"{_kind(old)} -> {_kind(layer)}"
        self.changes.append(Change("replace layer", target, ", ".join(n.name for n in calls), detail, old, layer))

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
            self.changes.append(Change("rewire", "", new.name, f"{len(changed)} uses of {old.name}"))

    def remove(self, node: Node) -> None:
        """Remove a node that nothing uses. Raises RewriteError if something does."""
        if node.users:
            raise RewriteError(f"{node.name} is still used by {', '.join(u.name for u in node.users)}")
        path = str(node.target) if node.op == "call_module" else ""
        self.graph.erase_node(node)
        self.changes.append(Change("remove", path, node.name, ""))

    def set_parameter(self, path: str, value: torch.Tensor) -> None:
        """Give the parameter or buffer at ``path`` a new tensor; all places that share it get the new one."""
        parent, _, name = path.rpartition(".")
        holder = self.program.module.get_submodule(parent)
        kind = "_parameters" if name in holder._parameters else "_buffers"
        old = getattr(holder, kind).get(name)
        if old is None:
            raise RewriteError(f"there is no parameter or buffer {path}")
        new = nn.Parameter(value.detach().clone(), old.requires_grad) if kind == "_parameters" else value.detach().clone()
        for module in self.program.module.modules():
            for key, tensor in list(getattr(module, kind).items()):
                if tensor is old:
                    getattr(module, kind)[key] = new
        self.changes.append(Change("set parameter", path, "", f"{tuple(old.shape)} -> {tuple(new.shape)}"))

    def value_of(self, node: Node) -> Any:
        """The FakeTensor value of a node, computed from those of its inputs."""
        return fake_value(self.program.module, node, known=self._fakes)

    def _inserted(self, made: Node, near: Node, detail: str, layer: nn.Module | None) -> Node:
        made.meta.update({k: v for k, v in near.meta.items() if k in _KEPT_META and k != "whole"})
        made.meta["val"] = self.value_of(made)
        self._sign(made, [near])
        path = str(made.target) if made.op == "call_module" else ""
        self.changes.append(Change("insert", path, made.name, detail, None, layer))
        return made

    def _check_value(self, node: Node, value: Any) -> None:
        old, new = _shapes(node.meta.get("val")), _shapes(value)
        if old != new:
            raise RewriteError(f"the new layer at {node.target} gives {new} where the old one gave {old}")
        node.meta["val"] = value

    def _sign(self, node: Node, sources: Sequence[Node]) -> None:
        mark = {"pass": self.author, "from": tuple(s.name for s in sources)}
        node.meta["provenance"] = (*node.meta.get("provenance", ()), mark)

    def _beside(self, path: str) -> str:
        number = 1
        while self._exists(f"{path}_{number}"):
            number += 1
        return f"{path}_{number}"

    def _free(self, path: str) -> str:
        if self._exists(path):
            raise RewriteError(f"there is a module at {path} already")
        return path

    def _exists(self, path: str) -> bool:
        parent, _, name = path.rpartition(".")
        try:
            return hasattr(self.program.module.get_submodule(parent), name)
        except AttributeError:
            return False

    def _put(self, path: str, layer: nn.Module) -> None:
        holder: nn.Module = self.program.module
        *parents, name = path.split(".")
        for part in parents:
            if part not in holder._modules:
                holder.add_module(part, Container())
            found = holder._modules[part]
            assert found is not None
            holder = found
        old = holder._modules.get(name)
        holder._modules[name] = layer
        places = self.holders.pop(id(old), [(holder, name)]) if old is not None else [(holder, name)]
        for other, key in places:
            other._modules[key] = layer
        self.holders[id(layer)] = places


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda v: (tuple(str(s) for s in v.shape), v.dtype) if isinstance(v, torch.Tensor) else v, value)
