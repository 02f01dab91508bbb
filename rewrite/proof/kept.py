"""What every pass keeps: the structure of the graph, signature, ties, and tensors outside its edits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from rewrite.graph.change import Change
from rewrite.graph.fakes import fake_value
from rewrite.graph.history import Check
from rewrite.graph.nodes import tensor_value
from rewrite.graph.program import Program
from rewrite.graph.tree import names_of_modules, names_of_tensors, tied
from rewrite.numerics.compare import same_bytes
from rewrite.torch_private import pytree


def structure(before: Program, after: Program, changes: Sequence[Change]) -> Iterator[Check]:
    """The checks that need no values: the graph, shapes, the signature, tied weights, the state."""
    after.graph.lint()
    yield Check("graph", True, "lint")
    yield _check_values(after)
    yield from outputs_and_signature(before, after)
    yield _ties(before, after, changes)
    yield _state(before, after, changes)


def outputs_and_signature(before: Program, after: Program) -> Iterator[Check]:
    """Whether both take the same arguments and give outputs of the same shapes and dtypes."""
    old, new = _output_values(before), _output_values(after)
    yield Check("outputs", old == new, "shapes and dtypes" if old == new else f"{new} instead of {old}")
    same = before.module.interface.signature == after.module.interface.signature
    yield Check("signature", same)


def _check_values(program: Program) -> Check:
    """Propagate FakeTensors anew and compare with the values that the nodes carry."""
    values: dict[Node, Any] = {}
    known = program.module.shapes
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            values[node] = node.meta.get("val")
        elif node.op != "output":
            carried = tensor_value(node)
            if "provenance" not in node.meta and not any(n.meta.get("provenance") for n in node.all_input_nodes):
                values[node] = node.meta.get("val")
                continue
            try:
                values[node] = fake_value(program.module, node, values, known)
            except Exception:
                if "provenance" in node.meta:
                    raise
                values[node] = node.meta.get("val")  # an operator that dynamic sizes defeat, as recurrent ones do
            if carried is None or _described(values[node]) == _described(carried):
                continue
            if _unnamed(_described(values[node])) != _unnamed(_described(carried)):
                return Check(
                    "values", False, f"{node.name} gives {_described(values[node])}, its metadata says {_described(carried)}"
                )
            values[node] = carried  # whose sizes that data decide have the names that other nodes know them by
    return Check("values", True, "FakeTensor shapes and dtypes")


def _described(value: Any) -> str:
    return f"{tuple(str(s) for s in value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)


def _unnamed(text: str) -> str:
    """A description whose sizes that data decide (u0, u1) are numbered anew: each run of an operator names them anew."""
    seen: dict[str, str] = {}
    return re.sub(r"\bu\d+\b", lambda found: seen.setdefault(found[0], f"u{len(seen)}"), text)


def _output_values(program: Program) -> list[str]:
    outputs = program.graph.output_node().args[0]
    return [_described(n.meta.get("val")) if isinstance(n, Node) else repr(n) for n in pytree.tree_leaves(outputs)]


def _edited_paths(program: Program, changes: Sequence[Change]) -> set[str]:
    """The paths that edits name, and every other name of the modules and tensors there."""
    paths = {c.path for c in changes if c.path}
    names = (*names_of_modules(program.module).values(), *names_of_tensors(program.module).values())
    return paths.union(*(group for group in names if not paths.isdisjoint(group)))


def _edited(name: str, paths: set[str]) -> bool:
    """Whether a name lies at or below one of the paths."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in paths for i in range(1, len(parts) + 1))


def _ties(before: Program, after: Program, changes: Sequence[Change]) -> Check:
    """Names of one parameter stay names of one parameter, as far as they are still there and were not untied."""
    untied = {c.path for c in changes if c.kind == "untie"}
    number = {name: key for key, names in names_of_tensors(after.module).items() for name in names}
    for group in tied(before.module):
        if len({number[name] for name in group if name in number and name not in untied}) > 1:
            return Check("tied weights", False, f"{sorted(group)} are no longer one tensor")
    return Check("tied weights", True)


def _state(before: Program, after: Program, changes: Sequence[Change]) -> Check:
    """Keys that came or went, and tensors that changed, must lie under edited paths; the rest is kept bit for bit."""
    paths = _edited_paths(after, changes)
    old, new = before.module.state_dict(), after.module.state_dict()
    unexplained = [k for k in old.keys() ^ new.keys() if not _edited(k, paths)]
    if unexplained:
        return Check("kept", False, f"state_dict key {unexplained[0]} has no edit that explains it")
    kept = [k for k in old if k in new and not _edited(k, paths)]
    moved = [k for k in kept if not same_bytes(old[k], new[k])]
    return Check("kept", not moved, f"{len(kept)} tensors bit for bit" if not moved else f"{moved[0]} changed")
