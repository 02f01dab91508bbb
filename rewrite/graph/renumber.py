"""Renumbering the modules of a list: the same model, whose blocks have other numbers, so that new ones fit in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from rewrite.errors import RewriteError

from . import meta
from .nodes import attribute
from .program import LayerGraph, Program


def renamed(path: str, names: Mapping[str, str]) -> str:
    """A path under the new name of the module that it is, or lies below."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        new = names.get(".".join(parts[:i]))
        if new is not None:
            return ".".join([new, *parts[i:]])
    return path


def renumber(module: LayerGraph, names: Mapping[str, str]) -> None:
    """Give children of modules other numbers, in the tree and in the graph. What stands at a new number must move too.

    ``names`` maps old paths to new ones. Raises RewriteError where two would have one name.
    """
    for parent in dict.fromkeys(old.rpartition(".")[0] for old in names):
        _among(module, parent, names)
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = renamed(str(node.target), names)
        if meta.STACK.on(node):
            meta.STACK.set(node, stacked(meta.STACK.of(node), names))


def _among(module: LayerGraph, parent: str, names: Mapping[str, str]) -> None:
    """Move the children of one module."""
    holder = attribute(module, parent) if parent else module
    if not isinstance(holder, nn.Module):
        raise RewriteError(f"there is no module at {parent}")
    path = f"{parent}." if parent else ""
    children = {names.get(f"{path}{name}", name).rpartition(".")[2]: child for name, child in holder._modules.items()}
    if len(children) != len(holder._modules):
        raise RewriteError(f"two modules of {parent or 'the model'} would be called the same")
    holder._modules.clear()
    holder._modules.update(children)
    in_order(holder)


def in_order(holder: nn.Module) -> None:
    """Let numbered children stand in the order of their numbers, behind what has a name."""
    found = sorted(holder._modules.items(), key=lambda item: int(item[0]) if item[0].isdigit() else -1)
    holder._modules.clear()
    holder._modules.update(found)


def stacked(stack: Mapping[str, tuple[str, object]], names: Mapping[str, str]) -> dict[str, tuple[str, object]]:
    """The module calls around a node under new names; the keys tell calls apart, so they follow."""
    made = {}
    for key, (path, kind) in stack.items():
        new = renamed(path, names)
        made[key if new == path else key.replace(path, new, 1)] = new, kind
    return made


def renumbered(program: Program, names: Mapping[str, str]) -> Program:
    """A program with its own skeleton and the same tensors, whose modules have other numbers."""
    if not names:
        return program
    made = program.clone(share=True)
    renumber(made.module, names)
    made.module.recompile()
    return named_anew(made, names)


def named_anew(program: Program, names: Mapping[str, str]) -> Program:
    """The program with what it says of its parts under their new names."""
    return replace(program, opaque=tuple(replace(part, path=renamed(part.path, names)) for part in program.opaque))
