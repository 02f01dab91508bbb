"""Repeating a part of a graph behind itself: its nodes once more on the value that it ended in, with modules of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Node

from rewrite.errors import RewriteError

from . import meta
from .nodes import attribute
from .program import Container
from .renumber import in_order, renamed, stacked

if TYPE_CHECKING:
    from .edit import Editor


def span(first: Node, last: Node, path: str) -> list[Node]:
    """The nodes that lead from one value to another, or that read tensors of the module at ``path`` for these, in order."""
    order = {node: i for i, node in enumerate(last.graph.nodes)}
    ahead, back = [last], set[Node]()
    while ahead:
        node = ahead.pop()
        if node not in back and node is not first:
            back.add(node)
            ahead += node.all_input_nodes
    inside: dict[Node, None] = {}
    for node in sorted(back, key=order.__getitem__):
        own = node.op in ("call_module", "get_attr") and f"{node.target}.".startswith(f"{path}.")
        if own or any(source is first or source in inside for source in node.all_input_nodes):
            inside[node] = None
    return list(inside)


def repeat(edit: Editor, path: str, to: str, nodes: Sequence[Node], first: Node, last: Node, after: Node) -> Node:
    """Copy the module at ``path`` to the free path ``to``, and run ``nodes`` once more with it on the value ``after``,
    which takes the place of ``first``. What read ``after`` reads the new value; the node of it.

    Raises RewriteError where the module shares a tensor with another one.
    """
    old = attribute(edit.program.module, path)
    _check_alone(edit, path, old)
    _hang(edit, to, copy.deepcopy(old))
    names = {path: to}
    made: dict[Node, Node] = {first: after}
    spot = after
    for node in nodes:
        with edit.graph.inserting_after(spot):
            spot = edit.graph.node_copy(node, lambda source: made.get(source, source))
        if node.op in ("call_module", "get_attr"):
            spot.target = renamed(str(node.target), names)
        meta.STACK.set(spot, stacked(meta.STACK.of(node), names))
        meta.PROVENANCE.drop(spot)
        made[node] = spot
        edit.came(spot, node)
    users = set(made.values())
    edit.rewire(after, made[last], lambda user: user not in users)
    return made[last]


def _check_alone(edit: Editor, path: str, module: nn.Module) -> None:
    own = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    root = edit.program.module
    for name, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
        if id(tensor) in own and not name.startswith(f"{path}."):
            raise RewriteError(f"{path} shares {name} with others: it cannot be repeated")


def _hang(edit: Editor, to: str, module: nn.Module) -> None:
    """Hang a module with all that is in it, each layer in the journal, and each tensor of what holds layers."""
    parent, _, name = to.rpartition(".")
    holder = attribute(edit.program.module, parent) if parent else edit.program.module
    if not isinstance(holder, nn.Module) or name in holder._modules:
        raise RewriteError(f"{to} is not free")
    edit.hang(holder, name, module)
    in_order(holder)
    for below, part in module.named_modules(remove_duplicate=False):
        home = f"{to}.{below}" if below else to
        if type(part) is Container and any(type(m) is not Container for m in part.modules()):
            for tensor in [*part._parameters, *part._buffers]:
                edit.note_new(f"{home}.{tensor}", None)
        else:
            edit.note_new(home, part)
