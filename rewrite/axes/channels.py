"""Widening convolutional nets and MLPs by copies (Net2WiderNet): which of their dimensions can be, and why others cannot.

W1' = W1[g], b1' = b1[g], W2'[:, j] = W2[:, g(j)] / m_g(j) + N_j, Σ N = 0 over the m copies of an entry. Whatever works entry
by entry goes along: activations, BatchNorm with its statistics, depthwise convolutions, concatenations, residual sums.

Source: Chen, Goodfellow and Shlens, Net2Net, ICLR 2016 (arXiv 1511.05641), section 2.
"""

from __future__ import annotations

from collections.abc import Iterator

from .dims import Dim
from .kinds import KEEPING
from .table import Table

_NAMES = ("channels", "hidden", "ffn", "dim")
_WRITING = frozenset({"out", "embedding", "rows"})


def channels_of(table: Table) -> Iterator[tuple[str, Dim]]:
    """The dimensions that layers with weights write, by name: channels of convolutions, units of linear layers."""
    for name, dim in table.named.items():
        written = any(place.role == "out" for place in table.places_of(dim))
        if name.split(".")[0] in _NAMES and dim.size > 1 and written:
            yield name, dim


def channels_obstacle(table: Table, dim: Dim) -> str:
    """Why a dimension cannot be widened by copies; empty if it can."""
    if dim.rigid:
        return dim.rigid
    meeting = sorted(dim.uses - KEEPING - {"shift"})
    if meeting == ["output"]:
        return "the model's output has this size"
    if meeting:
        return f"its entries meet in {', '.join(meeting)}: copies would be felt"
    roles = table.roles_of(dim)
    tied = [path for (path, _), own in roles.items() if "in" in own and own & _WRITING]
    if tied:
        return f"{tied[0]} both writes and reads it: its weight cannot be split for one of the two"
    return "" if any("in" in own for own in roles.values()) else "nothing reads it whose weight could be split"
