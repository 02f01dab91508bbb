"""Rules of complex numbers: pairs of real ones, which lie side by side in memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import Node

from rewrite.graph.nodes import packet

from .call import Axes, Call
from .dims import Dim
from .operators import rule

_NAMES = """
view reshape _unsafe_view unflatten flatten transpose permute unsqueeze squeeze split split_with_sizes chunk slice to detach
alias
"""
_VIEWS = frozenset(_NAMES.split())


@rule("view_as_complex")
def _view_as_complex(call: Call) -> Axes:
    own = call.axes("self")
    call.freeze(own[-1:], "real and imaginary part")
    _even_beside(call, call.named["self"], {atom for dim in own[-2:] for atom in dim.atoms()})
    return own[:-1]


@rule("view_as_real")
def _view_as_real(call: Call) -> Axes:
    return [*call.axes("self"), call.rigid(2, "real and imaginary part")]


def _even_beside(call: Call, node: object, atoms: set[Dim]) -> None:
    """What lies beside the pairs in the memory that they are a view of has an even size: so begin all pairs at one."""
    while isinstance(node, Node):
        found = call.known.get(node)
        for dim in found if isinstance(found, list) and all(isinstance(d, Dim) for d in found) else ():
            for factor in dim.factors():
                if factor.kind == "sum" and not atoms.isdisjoint(factor.atoms()):
                    _use_even(factor.segments(), atoms)
        name = getattr(packet(node), "__name__", "")
        is_view = name in _VIEWS or node.target is operator.getitem
        node = node.args[0] if is_view and node.args else None


def _use_even(segments: Sequence[Dim], atoms: set[Dim]) -> None:
    for segment in segments:
        if atoms.isdisjoint(segment.atoms()):
            segment.use("even")
