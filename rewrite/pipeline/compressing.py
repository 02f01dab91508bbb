"""A centered stream without its last unit, which is minus the sum of the others: d - 1 coordinates carry all of it.

What writes to the stream loses its last row; a linear map that reads a norm of it gets W[:, :-1] - W[:, -1:].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.analysis.linears import Linear, matrix
from rewrite.analysis.norms import Norm, norms
from rewrite.analysis.streams import Stream
from rewrite.analysis.writers import Written, named
from rewrite.axes.analyze import analyze
from rewrite.axes.resize import note_values, resize
from rewrite.graph.nodes import attribute
from rewrite.proof.judge import SLACK

from .folding import NormReaders, change_weights, flat, fold_affine

if TYPE_CHECKING:
    from rewrite.axes.dims import Dim
    from rewrite.axes.table import Table
    from rewrite.graph.program import Program

    from .centering import Centering
    from .context import Context

Pair = tuple[Norm, Stream]
"""A norm, and the stream that it reads."""


class CRMSNorm(nn.Module):
    """y = z / √((Σ z² + (Σ z)²) / d + eps): the RMSNorm of x = (z, -Σ z), d = len(z) + 1, without its last unit.

    In float32 at least, as torch's own norms compute.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        squares = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
        return (x * torch.rsqrt(squares / (x.shape[-1] + 1) + self.eps)).to(z.dtype)


class Compressing:
    """Compresses the streams that some norms read, all those of one dimension together."""

    def __init__(self, program: Program, context: Context, centering: Centering) -> None:
        self.program, self.context, self.centering = program, context, centering
        self.table = analyze(program)

    def run(self, pairs: Sequence[Pair]) -> None:
        """Compress what can be; the other norms are skipped with the reason."""
        groups: dict[Dim, list[Pair]] = {}
        for norm, stream in pairs:
            groups.setdefault(_dim_of(norm, self.table), []).append((norm, stream))
        reasons = {dim: self._obstacle(dim, group) for dim, group in groups.items()}
        for dim, group in groups.items():
            if reasons[dim]:
                for norm, _ in group:
                    self.context.skip(norm.path, reasons[dim])
            else:
                self._compress(group)

    def _obstacle(self, dim: Dim, group: Sequence[Pair]) -> str:
        """Why the streams of one dimension cannot be compressed; empty if they can."""
        if dim.kind != "atom" or dim.rigid:
            return f"its hidden dimension cannot change its size: {dim.rigid or 'it is made of several'}"
        taken = {norm.node for norm, _ in group}
        other = next((n for n in norms(self.program) if n.node not in taken and _dim_of(n, self.table) is dim), None)
        if other is not None:
            return f"{other.path} normalizes the same dimension, and is not to be replaced"
        streams = list({id(stream): stream for _, stream in group}.values())
        written = [self.centering.writers.of(stream, writer) for stream in streams for writer in stream.writers]
        layered = next((plan for plan in written if isinstance(plan, str)), "")
        if layered:
            return f"{layered}; without compressed=true a layer would center it"
        return self._reading(group, [plan for plan in written if isinstance(plan, Written)], dim)

    def _reading(self, group: Sequence[Pair], written: Sequence[Written], dim: Dim) -> str:
        """Why what reads the norms cannot take d - 1 units, or what else lies along the dimension."""
        baked = {path for plan in written for path, _ in plan.tensors} | {plan.gain for plan in written}
        shared = [path for plan in written for path in plan.shared]
        readers = NormReaders(self.program, shared, biased=True, convolutions=False)
        held = {path for norm, _ in group for path in (norm.weight_path, norm.bias_path)}
        for norm, _ in group:
            if norm.channel_axis != -1:
                return f"the channels of {norm.path} are not its last axis"
            if len(readers.uses.calls(norm.path)) > 1:
                return f"{norm.path} is called more than once"
            if reason := readers.obstacle(norm.node, shifted=norm.bias is not None):
                return f"{norm.path} keeps its weight: {reason}"
            linears = readers.linears(norm.node)
            if reason := next(filter(None, (self._rounding(norm, linear) for linear in linears)), ""):
                return reason
            held.update(rows.path for linear in linears for rows in linear.weight)
        extra = next((p.path for p in self.table.places_of(dim) if p.path not in baked | held), None)
        return f"{extra} lies along the same dimension, and is neither written to the stream nor reads it" if extra else ""

    def _rounding(self, norm: Norm, linear: Linear) -> str:
        """Why a linear map would round too much without the last unit; empty if it does not.

        A row w reads units of one size, each rounded by itself: with the error of |w|, and then with that of |w - w_last|.
        """
        weight = _weight(self.program, linear)
        if weight.is_meta:
            return ""
        gain = 1.0 if norm.weight_path is None else flat(attribute(self.program.module, norm.weight_path), norm.offset)
        weight = (weight * gain).detach().double()
        before, after = (float(w.norm(dim=1).max()) for w in (weight, _without_last(weight)))
        if after <= SLACK * before:
            return ""
        return (
            f"{named(linear.node)} reads the last unit by itself: as minus the sum of the others it would be rounded "
            f"{after / before:.0f} times as much"
        )

    def _compress(self, group: Sequence[Pair]) -> None:
        edit = self.context.edit
        for stream in {id(stream): stream for _, stream in group}.values():
            self.centering.center(stream)
        readers = NormReaders(self.program, convolutions=False)
        for norm, _ in group:
            linears = readers.linears(norm.node)
            fold_affine(edit, norm, linears)
            change_weights(edit, linears, _without_last)
        for norm, _ in group:
            edit.replace_layer(norm.path, CRMSNorm(0.0 if norm.eps is None else norm.eps))
        edit.move([norm.node for norm, _ in group], "without the last unit")
        table = analyze(self.program)
        dim = _dim_of(group[0][0], table)
        resize(edit, table, {dim: range(dim.size - 1)})
        note_values(edit, table, {dim: range(dim.size - 1)})


def _dim_of(norm: Norm, table: Table) -> Dim:
    """The dimension that a norm normalizes."""
    found: Dim = table.values[norm.node][norm.channel_axis].root()
    return found


def _weight(program: Program, linear: Linear) -> torch.Tensor:
    """W [out_features, in_features] of a linear map."""
    tensors = ((rows, attribute(program.module, rows.path)) for rows in linear.weight)
    return torch.cat([matrix(t, linear.layout)[rows.start : rows.stop] for rows, t in tensors])


def _without_last(weight: torch.Tensor) -> torch.Tensor:
    """W x for x whose sum is 0, read from all but the last unit of x: its last column is taken off all."""
    return weight - weight[:, -1:]
