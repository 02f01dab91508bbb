"""Folding a norm's weight and bias into the linear layers that read it."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.analysis.norms import Norm, norms
from rewrite.graph.tree import names_of_tensors
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
    A norm is left alone, with the reason, where something else than a linear layer reads it, where a reader is called
    elsewhere too or shares its weight, and where the norm has a bias and a reader has none to take it.

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
                self._fold(norm, context)

    def _fold(self, norm: Norm, context: Context) -> None:
        edit = context.edit
        for path in dict.fromkeys(str(reader.target) for reader in norm.node.users):
            weight, bias = f"{path}.weight", f"{path}.bias"
            if norm.bias_path is not None:  # first: it takes the weight that is not folded yet
                edit.set_parameter(bias, _shifted, bias, weight, norm.bias_path)
            if norm.weight_path is not None:
                edit.set_parameter(weight, functools.partial(_scaled, offset=norm.offset), weight, norm.weight_path)
        edit.replace_layer(norm.path, _without_affine(norm))


def _without_affine(norm: Norm) -> nn.Module:
    if norm.kind == "rms":
        return nn.RMSNorm(norm.shape, norm.eps, elementwise_affine=False)
    assert norm.eps is not None
    return nn.LayerNorm(norm.shape, norm.eps, elementwise_affine=False)


def _scaled(weight: torch.Tensor, gain: torch.Tensor, offset: float) -> torch.Tensor:
    """W diag(offset + g)."""
    return weight * (gain.reshape(-1) + offset)


def _shifted(bias: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """c + W b."""
    return bias + weight @ shift.reshape(-1)


class _Readers:
    """Who reads a norm, how often each layer is called, and which tensors are shared."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_module")
        self.names = names_of_tensors(program.module)

    def obstacle(self, norm: Norm) -> str:
        """Why a norm cannot be folded; empty if it can."""
        if norm.channel_axis != -1 or len(norm.shape) != 1:
            return "its channels are not the last axis alone"
        if self.calls[norm.path] > 1:
            return "it is called more than once"
        return next(filter(None, (self._reader(reader, norm) for reader in norm.node.users)), "")

    def _reader(self, reader: Node, norm: Norm) -> str:
        layer = self.program.layer(reader) if reader.op == "call_module" else None
        if not isinstance(layer, nn.Linear):
            return f"{_named(reader)} reads it, which is no linear layer"
        if self.calls[str(reader.target)] > 1:
            return f"{reader.target}, which reads it, is called elsewhere too"
        if len(self.names[id(layer.weight)]) > 1:
            return f"{reader.target}, which reads it, shares its weight with {_other(self.names[id(layer.weight)], reader)}"
        if norm.bias is not None and layer.bias is None:
            return f"{reader.target}, which reads it, has no bias to take its own"
        return ""


def _named(reader: Node) -> str:
    if reader.op == "output":
        return "the model's output"
    return str(reader.target) if reader.op == "call_module" else reader.name


def _other(names: list[str], reader: Node) -> str:
    return next(name for name in names if name != f"{reader.target}.weight")
