"""What keeps units from being copied, and how a dimension of a model is: norms, rests, tied tables, who reads zeros.

The counterpart of ``kinds`` for growing by copies (`copies`): LayerNorm is no obstacle, a tied table is.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import Node

from rewrite.analysis.kinds import is_projection
from rewrite.analysis.linears import linear_of
from rewrite.analysis.norms import Norm, norm_of
from rewrite.analysis.streams import streams
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import aten, packet
from rewrite.graph.program import Program
from rewrite.graph.tree import names_of_tensors
from rewrite.torch_private import _DropoutNd

from .copies import Copies, Rest
from .dims import Dim
from .rms import normalized, norms_along, other_norm, rescale
from .table import Table

COPIED = ("ffn", "heads", "hidden")
"""The kinds whose units can be copied."""
_KEEPING = frozenset({"in", "batch", "elementwise", "group", "norm", "shift"})
_MOVING = (aten.reshape, aten.view, aten.transpose, aten.permute, aten.contiguous, aten.clone, aten.to, aten.flatten)


def copy_obstacle(program: Program, table: Table, kind: str, dim: Dim, size: int, untie: bool) -> str:
    """Why a dimension cannot grow to a size by copies, and the way out; empty if it can."""
    if dim.rigid:
        return dim.rigid
    meeting = sorted(dim.uses - _KEEPING)
    if meeting == ["output"]:
        return "the model's output has this size: grow a model with a head, whose output is another"
    if meeting:
        return f"its entries meet in {', '.join(meeting)}: copies would be felt"
    if other_norm(program, table, dim):
        return other_norm(program, table, dim)
    tied = next(_tied(table, dim), None)
    if tied is not None and not untie:
        return f"{tied} writes to it and reads it, tied: one needs copies, the other a share: untie=true gives each its own"
    if size % dim.size:
        return _rest_obstacle(program, table, kind, dim)
    return ""


def _tied(table: Table, dim: Dim) -> Iterator[str]:
    """The tensors that write and read a dimension along one axis."""
    yield from dict.fromkeys(name for (name, _), found in table.roles_of(dim).items() if {"in", "out"} <= found)


def untied(edit: Editor, table: Table, dim: Dim) -> list[str]:
    """Give each table that writes and reads a dimension two tensors, the linear layer its own; the tables."""
    found = list(_tied(table, dim))
    for name in found:
        tensor = edit.program.module.get_parameter(name)
        names = names_of_tensors(edit.program.module)[id(tensor)]
        holders = {n: edit.program.module.get_submodule(n.rpartition(".")[0]) for n in names}
        edit.untie(next((n for n, holder in holders.items() if isinstance(holder, nn.Linear)), names[-1]))
    return found


def _rest_obstacle(program: Program, table: Table, kind: str, dim: Dim) -> str:
    """Why a size cannot be other than a multiple."""
    multiple = f"use a multiple of {dim.size}"
    found = norms_along(program, table, dim)
    if kind != "hidden":
        return f"it is normalized along it at {found[0].path}: {multiple}" if found else ""
    inside = {node for stream in streams(program) for node in stream.values}
    for norm in found:
        if norm.kind == "layer" and norm.node in inside:
            return f"Post-LN: {norm.path} writes to the stream what has no mean to go on with: {multiple}"
        if norm.weight_path is None:
            return f"the norm at {norm.path} has no gain to rescale: {multiple}"
        if [d.root() for d in normalized(norm, table)] != [dim]:
            return f"the norm at {norm.path} normalizes more than it: {multiple}"
    gains = {norm.weight_path for norm in found}
    scales = (p.path for p in table.places_of(dim) if p.role == "elementwise" and p.path not in gains)
    if _rest(found) != "mean":
        return ""
    if scale := next(scales, None):
        return f"{scale} scales its units one by one, which the mean does not follow: {multiple}"
    side = next((p for p in _modules_along(table, dim) if getattr(program.module.get_submodule(p), "groups", 1) > 1), "")
    return f"{side} filters its units one by one, which the mean does not follow: {multiple}" if side else ""


def _modules_along(table: Table, dim: Dim) -> Iterator[str]:
    """The modules that hold a tensor along a dimension."""
    yield from dict.fromkeys(place.path.rpartition(".")[0] for place in table.places_of(dim))


def _rest(found: list[Norm]) -> Rest:
    """What stands in the rest of a stream: where LayerNorms read it, the mean."""
    return "mean" if any(norm.kind == "layer" for norm in found) else "zero"


def copies_of(program: Program, table: Table, kind: str, dim: Dim, size: int) -> Copies:
    """How the units of a dimension are copied."""
    if kind != "hidden" or size % dim.size == 0:
        return Copies(dim, size)
    found = norms_along(program, table, dim)
    at_rest: dict[str, Rest] = {n.weight_path: "mean" for n in found if n.weight_path is not None}
    at_rest |= {n.bias_path: "zero" for n in found if n.bias_path is not None}
    rest = _rest(found)
    reading = _behind_norms(program) if rest == "mean" else None
    return Copies(dim, size, rest, lambda name: reading is None or name in reading, at_rest)


def _behind_norms(program: Program) -> set[str]:
    """The weights that read nothing but what norms give."""
    found: dict[str, bool] = {}
    for node in program.graph.nodes:
        if not is_projection(program, node):
            continue
        linear = linear_of(program, node)
        names = [f"{node.target}.weight"] if linear is None else [rows.path for rows in linear.weight]
        source = linear.source if linear is not None else node.args[0]
        for name in names:
            found[name] = found.get(name, True) and isinstance(source, Node) and _is_normed(program, source)
    return {name for name, own in found.items() if own}


def _is_normed(program: Program, node: Node) -> bool:
    while norm_of(program, node) is None:
        moves = packet(node) in _MOVING or (
            node.op == "call_module" and isinstance(program.layer(node), _DropoutNd | nn.Identity)
        )
        source = node.args[0] if node.args else None
        if not moves or not isinstance(source, Node):
            return False
        node = source
    return True


def prepare_copies(edit: Editor, table: Table, kind: str, copies: Copies) -> None:
    """Gains and eps of the norms along a stream that does not grow by a whole factor: c = q D / D'."""
    if kind == "hidden" and copies.rest != "none":
        whole = copies.size - copies.size % copies.dim.size
        rescale(edit, norms_along(edit.program, table, copies.dim), whole / copies.size)
