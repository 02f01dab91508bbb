"""Folding an affine map of the channels into the linear maps that read it: W (a ∘ n + b) + c = (W diag(a)) n + (c + W b).

A convolution without groups is such a map too, W and W b summed over its kernel; zeros that it puts around its input are
not a ∘ 0 + b, so that one with padding takes a alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.carry import dimensions
from rewrite.analysis.linears import (
    Layout,
    Linear,
    Readers,
    Rows,
    convolution_of,
    in_layout,
    linear_of,
    matrix,
    pads,
    readers,
)
from rewrite.analysis.norms import Norm
from rewrite.analysis.uses import Uses
from rewrite.analysis.writers import named
from rewrite.graph.layers import BiasedRMSNorm, ChannelsLayerNorm
from rewrite.graph.nodes import attribute

if TYPE_CHECKING:
    from rewrite.analysis.sites import Site
    from rewrite.graph.edit import Editor
    from rewrite.graph.program import Program

    from .context import Context

Vector = Callable[..., torch.Tensor]
"""From tensors of the model to one number a channel."""


class NormReaders:
    """Who reads the values of norms, how often each layer is called, and which tensors are shared.

    ``untied`` names tensors that will have been untied by then, with ``biased`` a layer without a bias is given one.
    Without ``averages`` nothing is folded through a mean of rows, without ``convolutions`` into linear layers alone.
    """

    def __init__(
        self,
        program: Program,
        untied: Collection[str] = (),
        *,
        biased: bool = False,
        averages: bool = True,
        convolutions: bool = True,
    ) -> None:
        self.program = program
        self.averages = averages
        self.convolutions = convolutions
        self.untied = untied
        self.biased = biased
        self.uses = Uses(program)
        self.tensors = Readers(program)

    def linears(self, node: Node, axis: int = -1) -> list[Linear]:
        """The linear maps that read a value along an axis, each once."""
        found = {reader: self._linear(reader) for reader, _, _ in self._readers(node, axis)}
        return [linear for linear in found.values() if linear is not None]

    def obstacle(self, node: Node, axis: int = -1, *, shifted: bool) -> str:
        """Why nothing can be folded into what reads a value along an axis, a shift neither where ``shifted``; or empty."""
        return next(filter(None, (self._reader(*found, shifted) for found in self._readers(node, axis))), "")

    def _readers(self, node: Node, axis: int) -> Iterator[tuple[Node, Node, int]]:
        return readers(self.program, node, axis % dimensions(node), averages=self.averages)

    def _linear(self, node: Node) -> Linear | None:
        found = linear_of(self.program, node)
        if found is not None and hasattr(found.layer, "plain"):
            return None  # it trains by an operator of its own: the gradient of what is folded would be no longer its own
        return convolution_of(self.program, node) if found is None and self.convolutions else found

    def _reader(self, reader: Node, source: Node, axis: int, shifted: bool) -> str:
        linear = self._linear(reader)
        if linear is None or linear.source is not source:
            return f"{named(reader)} reads it, which is no linear layer" + " or convolution" * self.convolutions
        if axis != _read_axis(linear):
            return f"{named(reader)} reads it along another axis"
        folded = [*linear.weight, *(linear.bias if shifted else ())]
        shared = next(filter(None, (self._shared(rows, reader) for rows in folded)), "")
        if shared:
            return f"{named(reader)}, which reads it, {shared}"
        if shifted and pads(linear.layer):
            return f"{named(reader)}, which reads it, puts zeros around it"
        if shifted and not linear.bias and not (self.biased and linear.layer is not None):
            return f"{named(reader)}, which reads it, has no bias to take its own"
        return ""

    def _shared(self, rows: Rows, reader: Node) -> str:
        """Why a tensor that a linear map uses cannot be changed for it alone."""
        tensor = attribute(self.program.module, rows.path)
        if not isinstance(tensor, nn.Parameter):
            return f"has {rows.path or 'a constant'} in its bias, which is no parameter"
        other = next((name for name in self.uses.names(tensor) if name not in (rows.path, *self.untied)), None)
        if other is not None:
            return f"shares its {rows.path.rpartition('.')[2]} with {other}"
        others = [node for node, own in self.tensors.of(rows) if node is not reader and own.path not in self.untied]
        if not others:
            return ""
        return "is called elsewhere too" if reader.op == "call_module" else f"shares {rows.path} with {others[0].name}"


def _read_axis(linear: Linear) -> int:
    """The axis of what a linear map reads that its weights lie along."""
    return dimensions(linear.source) - 1 - len(getattr(linear.layer, "kernel_size", ()))


def fold_shift(edit: Editor, linears: Sequence[Linear], shift: Vector, *sources: str) -> None:
    """c becomes c + W b for b = shift(sources), with the weights as they are now: fold it before a gain.

    A layer without a bias is given W b as one.
    """
    for linear in linears:
        weights = [rows.path for rows in linear.weight]
        start = 0
        for rows in linear.bias or (Rows(f"{linear.path}.bias", 0, linear.out_features),):
            compute = _Shifted(rows, start, linear.weight, linear.layout, shift, len(sources), bool(linear.bias))
            edit.set_parameter(rows.path, compute, *[rows.path] * compute.biased, *sources, *weights)
            start += rows.size


def fold_gain(edit: Editor, linears: Sequence[Linear], gain: Vector, *sources: str) -> None:
    """W becomes W diag(a) for a = gain(sources), which may also be one number."""
    change_weights(edit, linears, _Scaled(gain), *sources)


def change_weights(edit: Editor, linears: Sequence[Linear], change: Vector, *sources: str) -> None:
    """W [out_features, in_features] becomes change(W, *sources), in the rows of tensors that the linear maps use."""
    for linear in linears:
        for rows in linear.weight:
            edit.set_parameter(rows.path, _Changed(rows, linear.layout, change), rows.path, *sources)


def affine_obstacle(norm: Norm, found: NormReaders) -> str:
    """Why a norm's weight and bias cannot be folded; empty if they can."""
    if len(norm.shape) != 1:
        return "it normalizes more than one axis"
    if len(found.uses.calls(norm.path)) > 1:
        return "it is called more than once"
    return found.obstacle(norm.node, norm.channel_axis, shifted=norm.bias is not None)


def without_affine(norm: Norm) -> nn.Module:
    """The norm without weight and bias."""
    if norm.kind == "rms" and norm.channel_axis == -1:
        return nn.RMSNorm(norm.shape, norm.eps, elementwise_affine=False)
    if norm.kind == "rms":
        return BiasedRMSNorm(norm.shape, norm.eps, None, None, norm.channel_axis)
    assert norm.eps is not None
    if norm.channel_axis == -1:
        return nn.LayerNorm(norm.shape, norm.eps, elementwise_affine=False)
    return ChannelsLayerNorm(norm.shape[0], norm.eps)


def fold_affine(edit: Editor, norm: Norm, linears: Sequence[Linear]) -> None:
    """A norm's weight and bias into the linear maps that read it; the norm still has them."""
    if norm.bias_path is not None:  # first: it takes the weight that is not folded yet
        fold_shift(edit, linears, flat, norm.bias_path)
    if norm.weight_path is not None:
        fold_gain(edit, linears, functools.partial(flat, offset=norm.offset), norm.weight_path)


def fold_statistics(found: Iterable[Site], fold: Callable[[Site], str], context: Context) -> None:
    """Fold norms by running statistics, each by ``fold``, which says why one stays; what training loses is said."""
    folded = 0
    for site in found:
        if reason := fold(site):
            context.skip(site.path, reason)
            continue
        context.edit.rewire(site.node, site.node.all_input_nodes[0])
        context.edit.remove_unused([site.node], site.path, "folded into the layer beside it")
        folded += 1
    context.edit.sweep()
    if folded:
        context.warn(f"{folded} norms no longer take statistics in training: fold a model that is trained")


def flat(tensor: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """A norm's parameter as one number a channel."""
    return tensor.reshape(-1) + offset


@dataclass(frozen=True)
class _Scaled:
    """W diag(a)."""

    gain: Vector

    def __call__(self, weight: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return weight * self.gain(*sources)


@dataclass(frozen=True)
class _Changed:
    """A tensor with the rows of W that the linear map uses changed."""

    rows: Rows
    layout: Layout
    change: Vector

    def __call__(self, weight: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        whole = matrix(weight, self.layout)
        changed = self.change(whole[self.rows.start : self.rows.stop], *sources)
        whole = torch.cat([whole[: self.rows.start], changed, whole[self.rows.stop :]])
        return in_layout(whole, self.layout)


@dataclass(frozen=True)
class _Shifted:
    """c + W b, in the rows of c that the linear map uses, the ones from ``start`` on of its own."""

    rows: Rows
    start: int
    weights: tuple[Rows, ...]
    layout: Layout
    shift: Vector
    count: int
    biased: bool

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        bias, tensors = (tensors[0], tensors[1:]) if self.biased else (None, tensors)
        shift, weights = self.shift(*tensors[: self.count]), tensors[self.count :]
        used = (matrix(w, self.layout) for w in weights)
        weight = torch.cat([w[part.start : part.stop] for w, part in zip(used, self.weights, strict=True)])
        summed = (weight @ shift).reshape(len(weight), -1).sum(1)
        moved = summed[self.start : self.start + self.rows.size]
        if bias is None:
            return moved
        moved = bias[self.rows.start : self.rows.stop] + moved
        return torch.cat([bias[: self.rows.start], moved, bias[self.rows.stop :]])
