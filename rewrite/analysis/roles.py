"""What a norm is for: whether attention or an FFN reads it, or whether it ends the model."""

from __future__ import annotations

from typing import Literal

from torch.fx import Node

from rewrite.graph.program import Program

from .branches import branches
from .norms import norms

Role = Literal["attention", "ffn", "final", "other"]


def roles(program: Program) -> dict[Node, Role]:
    """The role of each norm call: that of the first branch that it belongs to, ``final`` behind the last branch.

    A norm belongs to a branch at whose start or end it stands, within which it is (as those of queries and keys are), or
    that it follows on the stream. What no branch has, such as the norm of an embedding, is ``other``.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found: dict[Node, Role] = {}
    last = -1
    for branch in branches(program):
        role: Role = "attention" if branch.kind == "attention" else "ffn" if "ffn" in branch.kind else "other"
        last = max(last, order[branch.addition])
        for node in (*branch.norms, *branch.end_norms, *branch.nodes, *branch.stream_norms):
            found.setdefault(node, role)
    calls = [norm.node for norm in norms(program)]
    return {node: found.get(node, "final" if order[node] > last >= 0 else "other") for node in calls}
