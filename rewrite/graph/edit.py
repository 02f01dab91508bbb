"""The only way to change a graph. Every change is journaled, keeps metadata and values, and says where it came from.

An editor works on a program of its own (``apply`` clones before a pass). Tensors are never written in place: a changed
parameter is a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.errors import RewriteError
from rewrite.torch_private import pytree

from . import meta
from .calls import Calls
from .change import Change
from .edit_nodes import NodeEdits
from .edit_tensors import TensorEdits
from .edit_values import ValueEdits
from .fakes import fake_value
from .like import like
from .module_calls import ModuleCall, module_calls
from .nodes import attribute
from .properties import thawed
from .relation import Relation
from .renumber import renumber
from .repeat import repeat, span
from .tree import Places


class Editor(NodeEdits, TensorEdits, ValueEdits):
    """Changes one program on behalf of one pass."""

    def replace_layer(
        self, path: str, layer: nn.Module, calls: Sequence[Node] | None = None, *, reshape: bool = False
    ) -> None:
        """Replace the layer at ``path`` by ``layer``, for all its calls or for some.

        Where only some ``calls`` are replaced, the others keep the old layer and these get ``layer`` at a path of its
        own beside it. Children of the old layer stay below the new one: they are layers of their own.

        Raises RewriteError if the new layer's output differs in shape or dtype from the old one's; nothing is changed then.
        With ``reshape`` it may have another shape: what reads it has to be edited too, which is checked after the pass.
        """
        old = attribute(self.program.module, path)
        if not isinstance(old, nn.Module):
            raise RewriteError(f"there is no layer at {path}")
        every = self._calls.of(path)
        calls = every if calls is None else list(calls)
        values = [self._checked(node, layer, reshape) for node in calls]
        layer.train(old.training)
        for name, child in old._modules.items():
            layer._modules.setdefault(name, child)
        target = path if len(calls) == len(every) else self._beside(path)
        self._put(target, layer)
        for node, value in zip(calls, values, strict=True):
            self._calls.move(node, target)
            if _shapes(value) != _shapes(meta.VALUE.of(node)):
                self._reshaped.add(node)
            meta.VALUE.set(node, value)
            self._sign(node, [node])
        names = tuple(n.name for n in calls)
        self._note(
            "replace layer", target, ", ".join(names), f"{type(old).__name__} -> {type(layer).__name__}", names, old, layer
        )
        self._repoint(self._calls.reads_below(path))

    def write_apart(self, value: Node) -> None:
        """Give layers that write into a value in place a result of their own: for a value that others read or keep, too."""
        for user in list(value.users):
            layer: Any = attribute(self.program.module, str(user.target)) if user.op == "call_module" else None
            if getattr(layer, "inplace", False):
                self.replace_layer(str(user.target), like(layer, type(layer), inplace=False), [user])

    def replace_module(self, path: str, layer: nn.Module) -> None:
        """Replace every call of the user's module at ``path``, with all that is in it, by a call of ``layer``.

        ``layer`` is given the one tensor that flows into the module and gives the one that flows out of it. ``graft`` puts
        it in the module's place, whatever else your class hands to the module, or takes from it.

        Raises RewriteError where the module is not called, is given or gives more tensors than one, holds a layer that is
        called from elsewhere, or where the new output has another shape or dtype; nothing is changed then.
        """
        calls = module_calls(self.graph, path)
        if not calls:
            raise RewriteError(f"there is no call of a module at {path} in this program")
        ends = [call.single() for call in calls]
        old = attribute(self.program.module, path)
        self._check_alone(path, calls)
        for source, result in ends:
            self._check_gives(path, layer, source, result)
        layer.train(old.training if isinstance(old, nn.Module) else self.program.module.training)
        self._put(path, layer)
        kind = calls[0].stack[calls[0].key][1]
        words = f"{str(getattr(kind, '__qualname__', kind)).rpartition('.')[2]} -> {type(layer).__name__}"
        made = [self._call_instead(call, source, result) for call, (source, result) in zip(calls, ends, strict=True)]
        self._note("replace module", path, ", ".join(made), words, tuple(made), old, layer)
        self.remove_unused([n for call in calls for n in call.nodes], path, "what the module did")

    def _check_alone(self, path: str, calls: Sequence[ModuleCall]) -> None:
        inside = {node for call in calls for node in call.nodes}
        for node in self.graph.nodes:
            below = node.op in ("call_module", "get_attr") and f"{node.target}.".startswith(f"{path}.")
            if below and node not in inside and not inside.issuperset(node.users):
                raise RewriteError(f"{node.target}, which is part of the module at {path}, is used outside of it too")

    def _check_gives(self, path: str, layer: nn.Module, source: Node, result: Node) -> None:
        with self.graph.inserting_after(result):
            probe = self.graph.call_module(path, (source,))
        try:
            found = fake_value(self.program.module, probe, layer=layer)
        finally:
            self.graph.erase_node(probe)
        old, new = _shapes(meta.VALUE.of(result)), _shapes(found)
        if old != new:
            raise RewriteError(f"the new layer at {path} gives {new} where the module gave {old}")

    def _call_instead(self, call: ModuleCall, source: Node, result: Node) -> str:
        with self.graph.inserting_after(result):
            made = self.graph.call_module(call.path, (source,))
        self._calls.add(made)
        meta.inherit(made, result)
        meta.STACK.set(made, call.stack)
        meta.WHOLE.set(made, True)
        meta.VALUE.set(made, self.value_of(made))
        self._note("insert", call.path, made.name, f"in place of {len(call.nodes)} nodes", (made.name,))
        inside = set(call.nodes)
        self.rewire(result, made, lambda user: user not in inside)
        return made.name

    def _checked(self, node: Node, layer: nn.Module, reshape: bool) -> Any:
        """The value of a node if it called ``layer``, which must have the shape and dtype that it has now."""
        value = fake_value(self.program.module, node, known=self.program.module.shapes, layer=layer)
        old, new = _shapes(meta.VALUE.of(node)), _shapes(value)
        if old != new and not reshape:
            raise RewriteError(
                f"the new layer at {node.target} gives {new} where the old one gave {old}: "
                "replace_layer(..., reshape=True) where its readers are edited too"
            )
        return value

    def renumber(self, names: Mapping[str, str]) -> None:
        """Give modules of lists other numbers, so that new ones fit in between: old paths to new ones.

        It has to be the first edit of a pass. Raises RewriteError if it is not, and where two would have one name.
        """
        if self.changes:
            raise RewriteError("modules are renumbered before anything else is edited")
        if not names:
            return
        renumber(self.program.module, names)
        self._places, self._calls = Places(self.program.module), Calls(self.graph)
        holders = ", ".join(dict.fromkeys(old.rpartition(".")[0] for old in names))
        words = ", ".join(f"{old} -> {new}" for old, new in names.items())
        self.changes.append(Change("renumber", holders, "", words, names=tuple(names.items())))

    def repeat(self, path: str, to: str, first: Node, last: Node, after: Node | None = None) -> Node:
        """Run what leads from the value ``first`` to ``last`` once more behind ``after`` (or ``last``), with a copy at
        ``to`` of the module at ``path``; the node of its value, which all read that read ``after``.

        Raises RewriteError where ``to`` is not free, or the module shares a tensor with another one.
        """
        return repeat(self, path, to, span(first, last, path), first, last, after or last)

    def came(self, made: Node, source: Node) -> None:
        """Note a node that is a copy of another one."""
        self._calls.add(made)
        self._sign(made, [source])
        path = str(made.target) if made.op == "call_module" else ""
        self._note("insert", path, made.name, f"a copy of {source.name}", (made.name,))

    def hang(self, holder: nn.Module, name: str, module: nn.Module) -> None:
        """Put a new module into the tree."""
        self._places.put(holder, name, module)

    def note_new(self, path: str, layer: nn.Module | None) -> None:
        """Note a layer, or a tensor of none, that came with a module."""
        self._came.add(path)
        self._note("insert" if layer is not None else "set parameter", path, "", "came with a copied module", new=layer)

    def move(self, nodes: Collection[Node], detail: str, relation: Relation | Mapping[Node, Relation] | None = None) -> None:
        """Note that the values of some nodes become others on purpose. The proof holds what reads them, and not them.

        With a ``relation`` (one for all, or by node) they become r(x): each node is held to it where it stands, and what
        reads it is given r(x), so that the parts stay small. One that holds nowhere is as if it had not been said. Of a node
        that was moved before, the relation is that of the value it had since.
        """
        names = tuple(node.name for node in nodes)
        by_node = relation if isinstance(relation, Mapping) else dict.fromkeys(nodes, relation)
        relations = {node.name: its for node, its in by_node.items() if its is not None}
        if names:
            self._note("move", "", names[0], f"{detail}: {len(names)} values", names, relations=relations)

    def set_property(self, name: str, value: Any) -> None:
        """Set a property of the program, a plain JSON value; None takes it away.

        Raises RewriteError for a name that no installed package announces, and for a value that it cannot have.
        """
        before = self.program.properties
        after = {**before, name: value} if value is not None else {k: v for k, v in before.items() if k != name}
        self.program.module.assume(after)
        self._note("set property", "", name, f"{name}: {thawed(before.get(name))} -> {thawed(value)}")


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda v: (tuple(str(s) for s in v.shape), v.dtype) if isinstance(v, torch.Tensor) else v, value)
