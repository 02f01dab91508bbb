"""Branches that begin at another value of their stream, where the stream changes its shape on the way.

OPT flattens its stream, [samples, tokens, channels] to [samples · tokens, channels], before each FFN and back behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.graph.fakes import same_shape
from rewrite.graph.nodes import aten, packet
from rewrite.proof.contract import SAME, Contract

from .pass_ import Pass, option

if TYPE_CHECKING:
    from rewrite.graph.edit import Editor
    from rewrite.graph.program import Program

    from .context import Context

_RESHAPES = (aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze)


def behind(start: Node) -> list[Node]:
    """A value and those that it is another shape of, the nearest first: the last one was computed."""
    found = [start]
    while packet(found[-1]) in _RESHAPES and isinstance(source := found[-1].args[0], Node):
        found.append(source)
    return found


def shaped(value: Node, like: Node) -> Node:
    """A value where it has the shape of another one: itself, or what reads it alone and only reshapes it."""
    node = value
    while not same_shape(node, like) and len(node.users) == 1 and packet(next(iter(node.users))) in _RESHAPES:
        node = next(iter(node.users))
    return node if same_shape(node, like) else value


def fits(start: Node, value: Node) -> bool:
    """Whether what reads ``start`` can read ``value``, as it is or reshaped as ``start`` was."""
    return any(same_shape(node, value) for node in behind(start))


def own_reshapes(found: Sequence[tuple[Branch, Node]]) -> list[Pass]:
    """What has to come before branches, each of which is to begin at a value, where their shapes differ."""
    apart = [branch for branch, value in found if not same_shape(branch.starts[0], value) and fits(branch.starts[0], value)]
    paths = [branch.path for branch in apart]
    return [_OwnReshapes(",".join(paths))] if paths else []


def begin(edit: Editor, branch: Branch, value: Node) -> None:
    """Let a branch begin at ``value``, where its start ``fits`` that, behind the reshapes that are its own."""
    readers: Collection[Node] = branch.nodes
    for node in behind(branch.starts[0]):
        if same_shape(node, value):
            edit.rewire(node, value, set(readers).__contains__)
            return
        readers = [node]


@dataclass(frozen=True)
class _OwnReshapes(Pass):
    """Let some branches read reshapes of their own, beside those of the stream."""

    name = "branches-with-reshapes-of-their-own"
    branches: str = option("", "their paths")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        edit = context.edit
        for branch in [b for b in branches(program) if b.path in self.branches.split(",")]:
            *steps, own = behind(branch.starts[0])
            after = branch.starts[0]
            for step in reversed(steps):
                assert callable(step.target)
                own = after = edit.insert_function(step.target, (own, *step.args[1:]), step.kwargs, after=after)
            edit.move(steps, "it is computed twice")  # so that the proof holds both in one part
            edit.rewire(branch.starts[0], own, set(branch.nodes).__contains__)
