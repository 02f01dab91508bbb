"""Repeating a part of a graph behind itself: its nodes once more on the value that it ended in, with modules of its own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.errors import RewriteError

from . import meta
from .nodes import attribute
from .ops import FOLLOWING
from .program import Container
from .renumber import in_order, renamed, stacked

if TYPE_CHECKING:
    from .edit import Editor

_OF_FORM = (torch.ops.aten.sym_size.int, *FOLLOWING)


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


def for_others(nodes: Sequence[Node], first: Node) -> set[Node]:
    """Of a span the values that do not follow from ``first`` (its sizes, device and dtype aside) and that nodes outside of
    it read too, with what leads to them: the position bias that one block makes and all blocks read.
    """
    following = {first}
    for node in nodes:
        if node.target not in _OF_FORM and following.intersection(node.all_input_nodes):
            following.add(node)
    inside, found = {*nodes}, set[Node]()
    for node in reversed(nodes):
        if node not in following and any(
            user in found or (user not in inside and user.op != "output") for user in node.users
        ):
            found.add(node)
    return found


def repeat(edit: Editor, path: str, to: str, nodes: Sequence[Node], first: Node, last: Node, after: Node) -> Node:
    """Copy the module at ``path`` to the free path ``to``, and run ``nodes`` once more with it on the value ``after``,
    which takes the place of ``first``. What read ``after`` reads the new value; the node of it. What the module makes for
    others (see `for_others`) is made once, and the copy is without its layers.

    Raises RewriteError where the module shares a tensor with another one.
    """
    old = attribute(edit.program.module, path)
    _check_alone(edit, path, old)
    given = for_others(nodes, first)
    nodes = [node for node in nodes if node not in given]
    _hang(edit, to, _without(copy.deepcopy(old), {str(n.target) for n in given} - {str(n.target) for n in nodes}, path))
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


def _without(module: nn.Module, paths: Collection[str], path: str) -> nn.Module:
    """A module that stood at ``path``, without its parts at some paths."""
    for below in (p.removeprefix(f"{path}.") for p in paths if p.startswith(f"{path}.")):
        parent, _, name = below.rpartition(".")
        holder = module.get_submodule(parent)
        if name in holder._modules:
            del holder._modules[name]
    return module


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
