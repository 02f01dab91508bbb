"""Which values of a rewritten program should be which of the original's: the sums, or layers, right behind each edit.

Two values correspond where whatever reads the one reads the other: nodes of the same name and operation in both programs
tell. So behind FFNs that became one, the last sum of the original stands for the one that is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import leaves, module_path, tensor_value
from rewrite.graph.program import Program
from rewrite.graph.tree import names_of_tensors
from rewrite.numerics.compare import same_bytes


@dataclass(frozen=True)
class Pair:
    """A value of the original, ``old``, and the one of the rewritten program that should be it; both of one shape.

    ``linear`` is the call of the linear layer whose output enters the new value by itself, where that layer can be fitted.
    """

    path: str
    old: Node
    new: Node
    linear: Node | None = None


def pairs(old: Program, new: Program) -> list[Pair]:
    """The values behind each edit that correspond, in order; none where the programs have nothing in common."""
    before = {node.name: node for node in old.graph.nodes}
    partner = _partners(before, new)
    ends = {b.addition: b for b in branches(new)}
    found, edited, known = [], False, dict[Node, Node]()
    for node in new.graph.nodes:
        edited = edited or _is_edited(node, before.get(node.name), old, new, known)
        mate = partner.get(node)
        if edited and mate is not None and (node in ends or not ends) and _alike(mate, node):
            found.append(Pair(_path(node, ends.get(node)), mate, node, _fitted(new, node, ends.get(node))))
            edited, known[node] = False, mate
    return found


def _partners(before: Mapping[str, Node], new: Program) -> dict[Node, Node]:
    """For each value that all its readers agree on: the original's value that they read there."""
    votes: dict[Node, set[Node]] = defaultdict(set)
    for node in new.graph.nodes:
        for mine, theirs in _operands(node, before.get(node.name)):
            votes[mine].add(theirs)
    return {node: next(iter(read)) for node, read in votes.items() if len(read) == 1}


def _operands(node: Node, old: Node | None) -> Iterator[tuple[Node, Node]]:
    """What a node and its namesake of the original read, argument by argument, where they do the same."""
    if old is None or (node.op, node.target) != (old.op, old.target):
        return
    ours, theirs = [*leaves(node.args), *leaves(node.kwargs)], [*leaves(old.args), *leaves(old.kwargs)]
    if len(ours) == len(theirs):
        yield from ((a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Node) and isinstance(b, Node))


def _is_edited(node: Node, twin: Node | None, old: Program, new: Program, known: Mapping[Node, Node]) -> bool:
    """Whether a node is new, calls another layer than its namesake, or reads what is not known to stand for the same."""
    if twin is None or (node.op, node.target) != (twin.op, twin.target):
        return True
    if any(a.name != b.name and known.get(a) is not b for a, b in _operands(node, twin)):
        return True
    return node.op == "call_module" and not _same_layer(new.layer(node), old.layer(twin))


def _same_layer(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return type(a) is type(b) and list(ours) == list(theirs) and all(same_bytes(ours[k], theirs[k]) for k in ours)


def _alike(old: Node, new: Node) -> bool:
    a, b = tensor_value(old), tensor_value(new)
    return a is not None and b is not None and b.is_floating_point() and str(list(a.shape)) == str(list(b.shape))


def _path(node: Node, branch: Branch | None) -> str:
    return (branch.path if branch is not None else str(node.target) if node.op == "call_module" else "") or module_path(node)


def _fitted(program: Program, node: Node, branch: Branch | None) -> Node | None:
    """The linear layer whose output is added there, or is the value: called once, its tensors its own, trained."""
    call = node if branch is None else branch.writer
    layer = program.layer(call) if call.op == "call_module" else None
    if layer is None or type(layer) not in (nn.Linear, TransposedLinear) or not _alike(call, node):
        return None
    names = names_of_tensors(program.module)
    alone = all(p.requires_grad and len(names[id(p)]) == 1 for p in layer.parameters())
    calls = sum(n.op == "call_module" and n.target == call.target for n in program.graph.nodes)
    return call if alone and calls == 1 else None
