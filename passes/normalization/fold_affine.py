"""Folding a norm's weight and bias into the linear layers that read it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.analysis.linears import Layout, Linear, Readers, Rows, linear_of, readers
from rewrite.analysis.norms import Norm, norms
from rewrite.analysis.uses import Uses
from rewrite.analysis.writers import named
from rewrite.graph.nodes import attribute
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from torch.fx import Node

    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold a norm's weight and bias into the linear layers that read it: W (g n + b) + c = (W diag(g)) n + (c + W b).

    The norm n stays, without weight and bias of its own; the function and the gradients of all old parameters are the same.
    Linear layers are all that compute one: GPT-2's Conv1D, with W kept transposed, packed projections and concatenated
    biases, too. A norm is left alone, with the reason, where something else reads it, where a reader is called elsewhere
    too or shares its weight, and where the norm has a bias and a reader has none to take it.

    Source: Graef, "FlashNorm: fast normalization for LLMs" (arXiv 2407.09577), which folds the weight; the bias likewise.
    """

    name = "fold-affine"
    where: Selector = option(Selector("*"), "norms to fold: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        found = _Readers(program)
        affine = [norm for norm in norms(program) if norm.weight is not None or norm.bias is not None]
        for norm in context.choose(affine, self.where):
            reason = found.obstacle(norm)
            if reason:
                context.skip(norm.path, reason)
            else:
                self._fold(norm, found, context)

    def _fold(self, norm: Norm, found: _Readers, context: Context) -> None:
        for linear in found.linears(norm):
            if norm.bias_path is not None:  # first: it takes the weight that is not folded yet
                _fold_bias(linear, norm.bias_path, context)
            for rows in linear.weight if norm.weight_path is not None else ():
                scale = functools.partial(_scaled, offset=norm.offset, rows=rows, layout=linear.layout)
                context.edit.set_parameter(rows.path, scale, rows.path, norm.weight_path or "")
        context.edit.replace_layer(norm.path, _without_affine(norm))


def _fold_bias(linear: Linear, shift: str, context: Context) -> None:
    weights = [rows.path for rows in linear.weight]
    start = 0
    for rows in linear.bias:
        compute = functools.partial(_shifted, rows=rows, start=start, weights=linear.weight, layout=linear.layout)
        context.edit.set_parameter(rows.path, compute, rows.path, shift, *weights)
        start += rows.size


def _without_affine(norm: Norm) -> nn.Module:
    if norm.kind == "rms":
        return nn.RMSNorm(norm.shape, norm.eps, elementwise_affine=False)
    assert norm.eps is not None
    return nn.LayerNorm(norm.shape, norm.eps, elementwise_affine=False)


def _scaled(weight: torch.Tensor, gain: torch.Tensor, *, offset: float, rows: Rows, layout: Layout) -> torch.Tensor:
    """W diag(offset + g), in the rows of W that the linear map uses."""
    whole = weight if layout == "out_in" else weight.t()
    folded = whole[rows.start : rows.stop] * (gain.reshape(-1) + offset)
    whole = torch.cat([whole[: rows.start], folded, whole[rows.stop :]])
    return whole if layout == "out_in" else whole.t().contiguous()


def _shifted(
    bias: torch.Tensor,
    shift: torch.Tensor,
    *tensors: torch.Tensor,
    rows: Rows,
    start: int,
    weights: tuple[Rows, ...],
    layout: Layout,
) -> torch.Tensor:
    """c + W b, in the rows of c that the linear map uses, the ones from ``start`` on of its own."""
    used = (w if layout == "out_in" else w.t() for w in tensors)
    weight = torch.cat([w[part.start : part.stop] for w, part in zip(used, weights, strict=True)])
    moved = bias[rows.start : rows.stop] + (weight @ shift.reshape(-1))[start : start + rows.size]
    return torch.cat([bias[: rows.start], moved, bias[rows.stop :]])


class _Readers:
    """Who reads a norm, how often each layer is called, and which tensors are shared."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.uses = Uses(program)
        self.tensors = Readers(program)

    def linears(self, norm: Norm) -> list[Linear]:
        """The linear maps that read a norm, each once."""
        found = {reader: linear_of(self.program, reader) for reader, _ in readers(norm.node)}
        return [linear for linear in found.values() if linear is not None]

    def obstacle(self, norm: Norm) -> str:
        """Why a norm cannot be folded; empty if it can."""
        if norm.channel_axis != -1 or len(norm.shape) != 1:
            return "its channels are not the last axis alone"
        if len(self.uses.calls(norm.path)) > 1:
            return "it is called more than once"
        return next(filter(None, (self._reader(*pair, norm) for pair in readers(norm.node))), "")

    def _reader(self, reader: Node, source: Node, norm: Norm) -> str:
        linear = linear_of(self.program, reader)
        if linear is None or linear.source is not source:
            return f"{named(reader)} reads it, which is no linear layer"
        folded = [*linear.weight, *(linear.bias if norm.bias is not None else ())]
        shared = next(filter(None, (self._shared(rows, reader) for rows in folded)), "")
        if shared:
            return f"{named(reader)}, which reads it, {shared}"
        if norm.bias is not None and not linear.bias:
            return f"{named(reader)}, which reads it, has no bias to take its own"
        return ""

    def _shared(self, rows: Rows, reader: Node) -> str:
        """Why a tensor that a linear map uses cannot be changed for it alone."""
        tensor = attribute(self.program.module, rows.path)
        if not isinstance(tensor, nn.Parameter):
            return f"has {rows.path or 'a constant'} in its bias, which is no parameter"
        other = next((name for name in self.uses.names(tensor) if name != rows.path), None)
        if other is not None:
            return f"shares its {rows.path.rpartition('.')[2]} with {other}"
        others = [node for node, _ in self.tensors.of(rows) if node is not reader]
        if not others:
            return ""
        return "is called elsewhere too" if reader.op == "call_module" else f"shares {rows.path} with {others[0].name}"
