"""Inserting a layer behind a value, at a path that tells where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import attribute, module_path

if TYPE_CHECKING:
    from rewrite.graph.edit import Editor


def insert_behind(
    edit: Editor,
    node: Node,
    name: str,
    layer: nn.Module,
    users: Callable[[Node], bool] = lambda user: True,
    also: Sequence[Node] = (),
) -> Node:
    """Call ``layer`` on a node's value, and on those of ``also``, and let ``users`` of it use that: the new node.

    Behind a layer at ``a.b`` it stands at ``a.b_name``, behind an operator in the code of ``a`` at ``a.name``.
    """
    base = f"{node.target}_{name}" if node.op == "call_module" else f"{module_path(node)}.{name}".lstrip(".")
    path, number = base, 1
    while attribute(edit.program.module, path) is not None:
        path, number = f"{base}_{number}", number + 1
    after = node
    while after.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    made = edit.insert_layer(path, layer, [node, *also], after=after)
    edit.rewire(node, made, users=lambda user: user is not made and users(user))
    return made
