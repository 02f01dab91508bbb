"""FFNs taken apart: their first projections, activation and last projection, and whether several could be one wide FFN."""

from __future__ import annotations

import operator
from collections import Counter
from typing import NamedTuple

from torch import nn
from torch.fx import Node

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import aten, call_arguments, packet
from rewrite.graph.program import Program
from rewrite.graph.tree import names_of_tensors
from rewrite.torch_private import _DropoutNd

from .branches import Branch
from .carry import dimensions
from .factors import factor_of
from .norms import norm_of
from .writes import Writes


class FFN(NamedTuple):
    """An FFN that can be fused: its first projections (gate, up or up alone), activation, last projection.

    ``halves`` is 2 where gate and up are the two halves of one projection, else 1.
    """

    branch: Branch
    first: tuple[Node, ...]
    act: Node
    down: Node
    halves: int


class FFNs:
    """Takes FFNs of one state of a program apart, or says why one cannot be fused."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_module")
        self.names = names_of_tensors(program.module)
        self.writes = Writes(program.graph, program.module)

    def ffn(self, branch: Branch) -> FFN | str:
        """The parts of a branch, or why it must stay."""
        first, down = branch.parts.first, branch.output
        reason = self._obstacle(branch)
        if reason:
            return reason
        rest = [n for n in branch.nodes if n not in (*first, down, *branch.norms) and self._rate(n) is None]
        acts = [n for n in rest if n in branch.parts.activations]
        products = [n for n in rest if packet(n) is aten.mul]
        chunks = [n for n in rest if self._halves(n) and self._source(n) in first]
        pieces = [n for n in rest if n.target is operator.getitem and n.args[0] in chunks]
        straight = branch.writer is down and len(acts) == 1 and len(acts + products + chunks + pieces) == len(rest)
        if not straight or len(products) > 1 or len((*first, *chunks)) != 1 + len(products):
            return "it is more than two or three projections and an activation"
        if any(self.writes.into(n) for n in (*branch.nodes, *branch.starts, branch.addition)):
            return "something in it is written in place"
        return FFN(branch, self._ordered(first, acts[0]), acts[0], down, 2 if chunks else 1)

    def like(self, a: FFN, b: FFN) -> str:
        """In what two FFNs of a run differ; empty if they can be one."""
        layers = [[self.program.layer(n) for n in (*f.first, f.down)] for f in (a, b)]
        if (len(a.first), a.halves) != (len(b.first), b.halves):
            return "one is gated, or has gate and up in one, and the other is not"
        if any(type(x) is not type(y) for x, y in zip(*layers, strict=True)):
            return "they have other kinds of linear layers"
        if any((x.bias is None) != (y.bias is None) for x, y in zip(*layers, strict=True)):
            return "one has biases and the other has none"
        if repr(self.program.layer(a.act)) != repr(self.program.layer(b.act)):
            return "they have other activations"
        outer = [self.outer(f.branch) for f in (a, b)]
        if outer[0] != outer[1] and any(isinstance(o, str) for o in {*outer[0]} ^ {*outer[1]}):
            return "they have stochastic depth of other rates, or one has none"
        if self._inner(a) != self._inner(b) or outer[0] != outer[1]:
            return "they have dropout of other rates or elsewhere, or gate and up in another order"
        norms = [norm_of(self.program, f.branch.norms[0]) for f in (a, b)]
        kinds = [None if n is None else (n.kind, n.shape, n.eps, n.channel_axis) for n in norms]
        return "" if kinds[0] == kinds[1] is not None else "they have other norms"

    def outer(self, branch: Branch) -> tuple[float | str | None, ...]:
        """What drops a branch's output at random: units by their rates above 0, samples by the form of their factor."""
        rates = [(n, self._rate(n)) for n in branch.carriers]
        return tuple(factor_of(self.program, n) if rate is None else rate for n, rate in rates if rate != 0)

    def _inner(self, ffn: FFN) -> object:
        """What lies between the projections, from the last one back: the same for FFNs whose hidden units can be stacked."""

        def form(node: Node) -> object:
            if node in ffn.first:
                return ffn.first.index(node)
            rate, before = self._rate(node), [form(n) for n in node.all_input_nodes]
            what = str(rate or (packet(node), [a for a in node.args if not isinstance(a, Node)]))
            return before[0] if rate == 0 else (what, *sorted(before, key=str))

        return form(ffn.down.all_input_nodes[0])

    def _ordered(self, first: tuple[Node, ...], act: Node) -> tuple[Node, ...]:
        """The projection that the activation reads, then the other one."""
        return tuple(sorted(first, key=lambda n: n is not self._source(act)))

    def _source(self, node: Node) -> Node:
        """What a node reads, without the dropouts in between."""
        source = node.all_input_nodes[0]
        while self._rate(source) is not None:
            source = source.all_input_nodes[0]
        return source

    def _halves(self, node: Node) -> bool:
        """Whether a node cuts the last axis into two."""
        if packet(node) is not aten.chunk:
            return False
        named = call_arguments(node)
        return bool(named["chunks"] == 2 and named["dim"] in (-1, dimensions(node) - 1))

    def _obstacle(self, branch: Branch) -> str:
        """Why a branch is not normalized, or no FFN of plain linear layers, as one that is fused has to be."""
        if branch.order == "post":
            return "its norm stands after the addition"
        if branch.order != "pre" or len(branch.norms) != 1 or len(branch.starts) != 1:
            return "it has no norm at its start alone"
        if branch.leaks:
            return f"{branch.leaks[0].name} reads what it computes"
        reasons = (reason for node in (*branch.parts.first, branch.output) if (reason := self._linear(node)))
        return next(reasons, "") or self._dropout(branch)

    def _linear(self, node: Node) -> str:
        layer = self.program.layer(node) if node.op == "call_module" else None
        if layer is None or type(layer) not in (nn.Linear, TransposedLinear):
            return f"{node.target} is no plain linear layer"
        shared = any(len(self.names[id(p)]) > 1 for p in layer.parameters())
        return f"{node.target} is called or held elsewhere too" if shared or self.calls[str(node.target)] > 1 else ""

    def _dropout(self, branch: Branch) -> str:
        """Which dropout of a branch one FFN in the place of several cannot have; empty if none."""
        layers = [n for n in branch.carriers if n.op == "call_module"]
        plain = (n for n in layers if self._rate(n) is None and type(self.program.layer(n)) is not nn.Identity)
        if any(factor_of(self.program, n) is None for n in plain):
            return "what it adds is changed in training by more than a factor"
        early = any(self._rate(n.all_input_nodes[0]) is not None for n in branch.parts.first)
        return "it has dropout before its first projection" if early else ""

    def _rate(self, node: Node) -> float | None:
        """The rate of a dropout of single units, or of one that is off; None for all else."""
        layer = self.program.layer(node) if node.op == "call_module" else None
        return layer.p if isinstance(layer, _DropoutNd) and (type(layer) is nn.Dropout or not layer.p) else None
