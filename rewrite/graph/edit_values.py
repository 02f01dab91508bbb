"""Edits of sizes: literals of operators, and the values and attributes that follow where shapes change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import Argument

from rewrite.errors import RewriteError, first_line
from rewrite.torch_private import pytree

from . import meta
from .fakes import expression_of
from .journal import Journal
from .nodes import attribute, leaves, literal_arguments, set_argument
from .program import Container
from .sizes import followed
from .tree import names_of_tensors


class ValueEdits(Journal):
    """Literals and attributes are set, values are inferred anew."""

    def set_literal(self, node: Node, argument: str, value: Argument, region: str = "") -> None:
        """Set an argument of an operator's call, by its name in the operator's schema, such as the sizes of a reshape.

        The node is one of the program's graph, or of a graph of the region at a path. Nodes in the argument stay those that
        it had. Raises RewriteError for another node, and where there is no such argument.
        """
        arguments = literal_arguments(node)
        if argument not in arguments:
            known = f"it has {', '.join(arguments)}" if arguments else "it calls no operator"
            raise RewriteError(f"{node.name} has no argument {argument}: {known}")
        old = arguments[argument]
        if [n for n in leaves(old) if isinstance(n, Node)] != [n for n in leaves(value) if isinstance(n, Node)]:
            raise RewriteError(f"{argument} of {node.name} reads other nodes then: literals alone can be set")
        set_argument(node, argument, value)
        if region:
            attribute(self.program.module, region).recompile()
            self._note("set attribute", region, "", f"graphs: {argument} of {node.name} is {value}, it was {old}")
            return
        self._sign(node, [node])
        self._note("set literal", "", node.name, f"{argument}: {old} -> {value}", (node.name,))

    def set_attribute(self, path: str, name: str, value: object) -> None:
        """Set a plain attribute of the layer at ``path``, such as the ``in_features`` of a layer whose weight changed.

        Of a module that only holds others, such as the ``num_heads`` of an attention, it is noted for ``graft``: nothing
        in a program reads it.
        """
        layer = attribute(self.program.module, path)
        if not isinstance(layer, nn.Module) or name in layer._parameters or name in layer._buffers:
            raise RewriteError(f"there is no layer at {path} with a plain attribute {name}")
        old = getattr(layer, name, None)
        if type(layer) is not Container:
            setattr(layer, name, value)
        self._note("set attribute", path, "", f"{name}: {old} -> {value}")

    @property
    def reshapes(self) -> bool:
        """Whether an edit may have changed the shape of a value."""
        return bool(self._reshaped) or any(c.kind in ("set parameter", "set literal") for c in self.changes)

    def follow(self) -> None:
        """Let the attributes of layers follow the sizes of parameters that were set: ``out_features`` and its like."""
        for path in dict.fromkeys(c.path.rpartition(".")[0] for c in self.changes if c.kind == "set parameter"):
            for name, size in followed(attribute(self.program.module, path)):
                self.set_attribute(path, name, size)

    def revalue(self) -> None:
        """Infer the values of edited nodes anew, and of all that follow where shapes changed.

        Raises RewriteError, by name, for the first node that does not fit what it is given now.
        """
        moved = set(self._reshaped)
        for node in self.graph.nodes:
            old = meta.VALUE.of(node)
            if node.op in ("call_function", "call_module") and (
                self._is_edited(node) or not moved.isdisjoint(node.all_input_nodes)
            ):
                meta.VALUE.set(node, self._refitted(node))
            elif node.op == "get_attr":
                found = attribute(self.program.module, str(node.target))
                if isinstance(found, torch.Tensor) and isinstance(old, torch.Tensor) and found.shape != old.shape:
                    meta.VALUE.set(node, old.new_empty(tuple(found.shape)))
            if _layout(old) != _layout(meta.VALUE.of(node)):
                moved.add(node)

    def _is_edited(self, node: Node) -> bool:
        """Whether a node, or the layer that it calls, was edited."""
        if len(self.changes) != self._seen:
            self._seen = len(self.changes)
            names = (name for c in self.changes for name in c.nodes)
            paths = {c.path for c in self.changes if c.kind != "set parameter"}
            tensors = {c.path for c in self.changes if c.kind == "set parameter"}
            shared = [names for names in names_of_tensors(self.program.module).values() if not tensors.isdisjoint(names)]
            holders = {name.rpartition(".")[0] for name in (*tensors, *(n for names in shared for n in names))}
            self._edited = frozenset(names), frozenset(paths | holders)
        return node.name in self._edited[0] or (node.op == "call_module" and node.target in self._edited[1])

    def _refitted(self, node: Node) -> Any:
        """The value of a node from what it is given now."""
        try:
            return self.value_of(node)
        except Exception as error:
            called = f"the layer at {node.target}" if node.op == "call_module" else str(node.target)
            raise RewriteError(f"{node.name} ({called}) does not fit what it is given now: {first_line(error)}") from error


def _layout(value: Any) -> Any:
    def told(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        sizes = (*tensor.shape, *tensor.stride())
        return (*map(expression_of, sizes), tensor.dtype)

    return pytree.tree_map(told, value)
