"""Edits of the graph: nodes that come, go, or read something else, and what goes with the last of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import Argument

from rewrite.errors import RewriteError

from . import meta
from .journal import Journal
from .nodes import attribute, gives_kind_alone, is_pure, module_stack
from .program import Container


class NodeEdits(Journal):
    """Nodes and layers are inserted, rewired and removed."""

    def insert_layer(
        self, path: str, layer: nn.Module, inputs: Sequence[Argument], *, after: Node, place: Sequence[int] = ()
    ) -> Node:
        """Call a new layer at a free ``path`` on ``inputs``, right after a node; the node of its value.

        ``place`` is where it stands in the module tree, as ``place`` gives it for a path; at the end of its parent without.
        """
        self._put(self._free(path), layer, place)
        with self.graph.inserting_after(after):
            made = self.graph.call_module(path, tuple(inputs))
        return self._inserted(made, after, f"{type(layer).__name__} at {path}", layer)

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
        path = str(node.target) if node.op in ("call_module", "get_attr") else ""
        self._erase(node)
        self._note("remove", path, node.name, "", (node.name,))

    def remove_unused(self, nodes: Collection[Node], path: str, detail: str) -> None:
        """Remove those of ``nodes`` that nothing uses any more, and all that only they used: parameters that they read,
        layers and pure operators that fed them alone. Inputs of the graph stay.

        It is one change, at ``path``, of what ``detail`` says.
        """
        waiting = dict.fromkeys(sorted(nodes, reverse=True))
        names: list[str] = []
        while (node := next((n for n in waiting if not n.users), None)) is not None:
            del waiting[node]
            sources = node.all_input_nodes
            names.append(node.name)
            self._erase(node)
            fed = (s for s in sources if s.op == "call_module" or (s.op != "placeholder" and is_pure(s)))
            waiting.update(dict.fromkeys(fed))
        self._note("remove", path, ", ".join(names), f"{detail}, {len(names)} nodes", tuple(names))

    def _erase(self, node: Node) -> None:
        if node.users:
            raise RewriteError(f"{node.name} is still used by {', '.join(u.name for u in node.users)}")
        self._readers.pop(node, None)
        self._readers.update((n, None) for n in node.all_input_nodes if n.op == "get_attr")
        if node.op in ("call_module", "get_attr"):
            self._gone[str(node.target)] = None
        self._calls.drop(node)
        self.graph.erase_node(node)

    def sweep(self) -> None:
        """Take out of the module tree what nothing uses any more since its uses were removed.

        That is: layers that nothing calls; parameters whose last reader in the graph was removed; modules that held
        these and are left empty. Layers below a layer that goes and that are called by themselves stay where they are.
        """
        for node in [n for n in self._readers if not n.users]:
            self.remove(node)
        for path in self._gone:
            found = attribute(self.program.module, path)
            if isinstance(found, nn.Module) and not self._calls.of(path):
                self._sweep_layer(path, found)
            elif isinstance(found, torch.Tensor) and not self._is_used(path, found):
                self._take(path, "nothing reads it any more")
        self._gone.clear()
        self._repoint([n for n in self.graph.nodes if n.op == "get_attr"])

    def _sweep_layer(self, path: str, layer: nn.Module) -> None:
        called = {name: child for name, child in layer._modules.items() if self._calls.below(f"{path}.{name}")}
        if called:
            rest = Container().train(layer.training)
            rest._modules.update(called)
            self._put(path, rest)
            self._note("sweep", path, "", "nothing calls it any more, but layers below it", old=layer, new=rest)
        else:
            self._take(path, "nothing calls it any more")

    def _is_used(self, path: str, tensor: torch.Tensor) -> bool:
        """Whether the graph reads a tensor, under this name or another, or a layer that it calls holds it here."""
        reads = (n for n in self.graph.nodes if n.op == "get_attr")
        parts = path.split(".")
        return any(attribute(self.program.module, str(n.target)) is tensor for n in reads) or any(
            self._calls.of(".".join(parts[:i])) for i in range(1, len(parts))
        )

    def _take(self, path: str, why: str) -> None:
        """Take a module or tensor out of the tree, and what held it where that is left empty."""
        holder, name = self._parent(path)
        for held in (holder._modules, holder._parameters, holder._buffers):
            held.pop(name, None)
        holder._non_persistent_buffers_set.discard(name)
        self._note("sweep", path, "", why)
        if type(holder) is Container and not any((holder._modules, holder._parameters, holder._buffers)):
            self._take(path.rpartition(".")[0], "nothing is left in it")

    def _inserted(self, made: Node, near: Node, detail: str, layer: nn.Module | None) -> Node:
        self._calls.add(made)
        meta.inherit(made, near)
        if meta.WHOLE.of(near) and module_stack(near)[-1:] and module_stack(near)[-1][1] == near.target:
            meta.STACK.set(made, dict(list(meta.STACK.of(near).items())[:-1]))  # beside that layer, not in it
        meta.VALUE.set(made, self.value_of(made))
        self._sign(made, [near])
        path = str(made.target) if made.op == "call_module" else ""
        self._note("insert", path, made.name, detail, (made.name,), None, layer)
        return made

    def _repoint(self, reads: Sequence[Node]) -> None:
        """Where code took its dtype or device from a parameter that is not there any more, another one gives it."""
        for node in reads:
            if attribute(self.program.module, str(node.target)) is None:
                like = meta.VALUE.of(node)
                if not gives_kind_alone(node):
                    raise RewriteError(
                        f"{node.target} goes with its layer, and {next(iter(node.users), node).name} reads it"
                    )
                named = self.program.module.named_parameters()
                other = next((n for n, p in named if (p.dtype, p.device) == (like.dtype, like.device)), None)
                if other is None:
                    raise RewriteError(f"{node.target} goes with its layer, and no other parameter has its dtype and device")
                home = str(node.target).rpartition(".")[0]
                self._calls.move(node, other)
                meta.VALUE.set(node, like.new_empty(tuple(self._tensor(other).shape)))
                self._note("repoint", home, node.name, f"takes dtype and device from {other}", (node.name,))
