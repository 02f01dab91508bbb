"""FFNs one after the other as one wide FFN."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.blocks import Block
from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.influence import dependencies
from rewrite.analysis.norms import norm_of
from rewrite.analysis.windows import cut
from rewrite.analysis.writes import Writes
from rewrite.errors import OptionError, RewriteError
from rewrite.graph.fakes import same_shape
from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import aten, packet
from rewrite.graph.tree import names_of_tensors
from rewrite.pipeline.beginning import behind
from rewrite.pipeline.numbers import numbers
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.registry import get_pass
from rewrite.proof.contract import CLOSE, NEW, SAME, Contract
from rewrite.torch_private import _DropoutNd

from .parallel_block import ShareNorms

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

AUTO = "auto"
_FFN = ("ffn", "gated ffn")


@dataclass(frozen=True)
class FFNFusion(Pass):
    """Fuse runs of FFNs into one wide FFN: x + Σ W_2i act(W_1i n) = x + [W_21 W_22 ...] act([W_11; W_12; ...] n), n = N x.

    In steps, each proven: all FFNs of a run read what the first one reads (an approximation, whose error at each FFN's input
    is measured and held against `bound`; the model wants healing afterwards); norms' weights go into the projections; one
    norm serves all; the projections become one: up and gate below each other, down side by side, biases added, under the
    names of the run's first FFN. Drop attention first: a run is of FFNs that nothing else stands between.

    With data a run longer than `window`, or one of FFNs that depend on each other, is cut by M_ij = 1 - mean cos(h_j, h_j
    without i), h what an FFN adds: into as few parts as can be, of least Σ M_ij within them, none with an M_ij above
    `dependency`. Without data it is cut at `window`.

    Dropout of equal rates goes along. Behind the activation each hidden unit is dropped by a draw of its own, as before.
    Behind the last projection one draw serves the sum, where each FFN had its own: the mean is the same, the distribution
    is another, so that of the last step only evaluation is promised then. Without it training is held as well.

    Left alone, with the reason: norms after the addition, FFNs unlike each other (other rates of dropout too), stochastic
    depth.

    Source: Bercovich et al., "FFN Fusion: Rethinking Sequential Computation in Large Language Models" (arXiv 2503.18908),
    section 3 and appendix.
    """

    name = "ffn-fusion"
    absence = "no FFN is added to a residual stream"
    where: str = option(AUTO, "numbers of the layers, as `rewrite show` counts them: '1,2' or '4-8'; auto: all but the last")
    window: int = option(4, "the most FFNs that are fused into one", at_least=2)
    dependency: float = option(
        0.5, "with data: the largest M_ij of FFNs that are fused; 0 independent, 1 unlike", at_least=0
    )
    bound: float = option(1.0, "largest error of what an FFN reads, relative, root mean square", above=0, finite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = None if self.where == AUTO else numbers(self.where)
        except RewriteError as error:
            raise OptionError(f"option 'where' of pass '{self.name}': {error}", "where") from None

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound, evaluation_only=True)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        ffns = [b for b in branches(program) if b.kind in _FFN]
        last = max((b.layer for b in ffns), default=-1)
        chosen = tuple(range(last)) if self.where == AUTO else numbers(self.where)
        if ffns and chosen and chosen[-1] > last:
            raise RewriteError(f"where={self.where}: the model has FFNs in layers 0 to {last}")
        finder = _Finder(program)
        found = [run for run in _runs(ffns, chosen, finder, context) if run]
        rows, told = [run for run in found if len(run) > 1], {skip.path for skip in context.skipped}
        for path in (run[0].path for run in found if len(run) == 1 and run[0].path not in told):
            context.skip(path, "no FFN to fuse is next to it: drop-attention takes out what stands between")
        fused = [part for run in rows for part in self._parts(run, program, context) if len(part) > 1]
        if not fused:
            return []
        text = ";".join(",".join(b.path for b in run) for run in fused)
        layers = ",".join(str(b.layer) for run in fused for b in run)
        norms = [norm for run in fused for b in run for n in b.norms if (norm := norm_of(program, n)) is not None]
        affine = "|".join(norm.path for norm in norms if norm.weight is not None or norm.bias is not None)
        fold = [get_pass("fold-affine")(where=affine)] if affine else []
        redrawn = any(finder.outer(b) for run in fused for b in run)
        return [_Beside(text, self.bound), *fold, ShareNorms(layers), _Widen(text, redrawn)]

    def _parts(self, run: Sequence[Branch], program: Program, context: Context) -> Iterator[Sequence[Branch]]:
        """A run, cut by data where there is some, else at the window."""
        matrix = [[0.0] * len(run)] * len(run)
        if context.data is not None:
            blocks = [Block(b.layer, b.other, b.addition, (b,)) for b in run]
            matrix = [[*row] for row in dependencies(program, blocks, context.data, context.seed)]
        for start, end in cut(matrix, self.window, self.dependency):
            within = [matrix[i][j] for i in range(start, end) for j in range(i + 1, end)]
            if within and context.data is not None:
                context.measure(run[start].path, FFNs=end - start, largest=max(within), sum=sum(within))
            elif not within:
                context.skip(run[start].path, "no FFN of its run is left for it, or depends on it, or it on them, too much")
            yield run[start:end]


class FFN(NamedTuple):
    """An FFN that can be fused: its first projections (gate, up or up alone), activation, last projection."""

    branch: Branch
    first: tuple[Node, ...]
    act: Node
    down: Node


class _Finder:
    """Takes FFNs apart, or says why one cannot be fused."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_module")
        self.names = names_of_tensors(program.module)
        self.writes = Writes(program.graph, program.module)

    def ffn(self, branch: Branch) -> FFN | str:
        """The parts of a branch, or why it must stay."""
        first, down = branch.parts.first, branch.output
        if branch.order == "post":
            return "its norm stands after the addition"
        if branch.order != "pre" or len(branch.norms) != 1 or len(branch.starts) != 1:
            return "it has no norm at its start alone"
        if branch.leaks:
            return f"{branch.leaks[0].name} reads what it computes"
        for node in (*first, down):
            reason = self._linear(node)
            if reason:
                return reason
        reason = self._dropout(branch)
        if reason:
            return reason
        rest = [n for n in branch.nodes if n not in (*first, down, *branch.norms) and self._rate(n) is None]
        acts = [n for n in rest if n in branch.parts.activations]
        products = [n for n in rest if packet(n) is aten.mul]
        straight = branch.writer is down and len(acts) == 1 and len(acts) + len(products) == len(rest)
        if not straight or len(first) != 1 + len(products) or len(products) > 1:
            return "it is more than two or three projections and an activation"
        if any(self.writes.into(n) for n in (*branch.nodes, *branch.starts, branch.addition)):
            return "something in it is written in place"
        return FFN(branch, self._ordered(first, acts[0]), acts[0], down)

    def like(self, a: FFN, b: FFN) -> str:
        """In what two FFNs of a run differ; empty if they can be one."""
        layers = [[self.program.layer(n) for n in (*f.first, f.down)] for f in (a, b)]
        if len(a.first) != len(b.first):
            return "one is gated and the other is not"
        if any(type(x) is not type(y) for x, y in zip(*layers, strict=True)):
            return "they have other kinds of linear layers"
        if any((x.bias is None) != (y.bias is None) for x, y in zip(*layers, strict=True)):
            return "one has biases and the other has none"
        if repr(self.program.layer(a.act)) != repr(self.program.layer(b.act)):
            return "they have other activations"
        if self.inner(a) != self.inner(b) or self.outer(a.branch) != self.outer(b.branch):
            return "they have dropout of other rates, or elsewhere"
        norms = [norm_of(self.program, f.branch.norms[0]) for f in (a, b)]
        kinds = [None if n is None else (n.kind, n.shape, n.eps, n.channel_axis) for n in norms]
        return "" if kinds[0] == kinds[1] is not None else "they have other norms"

    def inner(self, ffn: FFN) -> object:
        """What lies between the projections, from the last one back: the same for FFNs whose hidden units can be stacked."""

        def form(node: Node) -> object:
            if node in ffn.first:
                return ffn.first.index(node)
            rate, before = self._rate(node), [form(n) for n in node.all_input_nodes]
            return before[0] if rate == 0 else (rate or str(packet(node)), *sorted(before, key=str))

        return form(ffn.down.all_input_nodes[0])

    def outer(self, branch: Branch) -> tuple[float, ...]:
        """The rates above 0 of what drops units of a branch's output."""
        return tuple(rate for n in branch.carriers if (rate := self._rate(n)))

    def _ordered(self, first: tuple[Node, ...], act: Node) -> tuple[Node, ...]:
        """The projection that the activation reads, then the other one."""
        return tuple(sorted(first, key=lambda n: n is not self._source(act)))

    def _source(self, node: Node) -> Node:
        """What a node reads, without the dropouts in between."""
        source = node.all_input_nodes[0]
        while self._rate(source) is not None:
            source = source.all_input_nodes[0]
        return source

    def _linear(self, node: Node) -> str:
        layer = self.program.layer(node) if node.op == "call_module" else None
        if layer is None or type(layer) not in (nn.Linear, TransposedLinear):
            return f"{node.target} is no plain linear layer"
        shared = any(len(self.names[id(p)]) > 1 for p in layer.parameters())
        return f"{node.target} is called or held elsewhere too" if shared or self.calls[str(node.target)] > 1 else ""

    def _dropout(self, branch: Branch) -> str:
        """Which dropout of a branch one FFN in the place of several cannot have; empty if none."""
        layers = [n for n in branch.carriers if n.op == "call_module"]
        if any(self._rate(n) is None and type(self.program.layer(n)) is not nn.Identity for n in layers):
            return "it is left out at random as a whole"
        early = any(self._rate(n.all_input_nodes[0]) is not None for n in branch.parts.first)
        return "it has dropout before its first projection" if early else ""

    def _rate(self, node: Node) -> float | None:
        """The rate of a dropout of single units, or of one that is off; None for all else."""
        layer = self.program.layer(node) if node.op == "call_module" else None
        return layer.p if isinstance(layer, _DropoutNd) and (type(layer) is nn.Dropout or not layer.p) else None


def _runs(ffns: Sequence[Branch], chosen: Sequence[int], finder: _Finder, context: Context) -> Iterator[list[Branch]]:
    """Runs of FFNs each of which reads the sum of the one before."""
    run: list[FFN] = []
    for branch in ffns:
        found = finder.ffn(branch) if branch.layer in chosen else "its layer is not among those to fuse"
        if isinstance(found, str):
            context.skip(branch.path, found)
            yield [f.branch for f in run]
            run = []
            continue
        follows = bool(run) and _follows(run[0].branch, run[-1].branch, branch)
        reason = finder.like(run[-1], found) if follows else ""
        if reason:
            context.skip(branch.path, f"it stands behind {run[-1].branch.path}: {reason}")
        if not follows or reason:
            yield [f.branch for f in run]
            run = []
        run.append(found)
    yield [f.branch for f in run]


def _follows(first: Branch, last: Branch, branch: Branch) -> bool:
    """Whether a branch, and nothing else, reads the sum of the last one of a run, in the shape that the first one reads."""
    found = behind(branch.starts[0])
    users = [len(node.users) for node in found]
    alone = users[0] == 2 and all(count == 1 for count in users[1:])
    return found[-1] is last.addition and alone and same_shape(branch.starts[0], first.starts[0])


def _found(program: Program, text: str) -> Iterator[list[Branch]]:
    """The FFNs of each run that a text names."""
    every = {b.path: b for b in branches(program) if b.kind in _FFN}
    yield from ([every[path] for path in run.split(",")] for run in text.split(";"))


@dataclass(frozen=True)
class _Beside(Pass):
    """Let all FFNs of a run read what the first one reads."""

    name = "ffns-side-by-side"
    runs: str = option("", "paths of each run: 'layers.1.mlp,layers.2.mlp;layers.4.mlp,layers.5.mlp'")
    bound: float = option(1.0, "largest error of what an FFN reads, relative, root mean square")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        for first, *others in list(_found(program, self.runs)):
            for branch in others:
                context.edit.rewire(branch.starts[0], first.starts[0], set(branch.nodes).__contains__)


@dataclass(frozen=True)
class _Widen(Pass):
    """Make FFNs that read one norm one wide FFN."""

    name = "widen-ffns"
    runs: str = option("", "paths of each run: 'layers.1.mlp,layers.2.mlp;layers.4.mlp,layers.5.mlp'")
    redrawn: bool = option(False, "one dropout is drawn for the sum where each FFN had its own: training is not the same")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME, evaluation_only=self.redrawn)

    def run(self, program: Program, context: Context) -> None:
        finder = _Finder(program)
        for run in list(_found(program, self.runs)):
            found = [finder.ffn(branch) for branch in run]
            reason = next((f for f in found if isinstance(f, str)), "")
            if not reason and len({f.branch.norms for f in found if isinstance(f, FFN)}) > 1:
                reason = "no one norm serves the FFNs of its run"
            if reason:
                context.skip(run[0].path, reason)
            else:
                _widen([f for f in found if isinstance(f, FFN)], program, context)
        context.edit.sweep()


def _widen(run: Sequence[FFN], program: Program, context: Context) -> None:
    edit, first = context.edit, run[0]
    for place, node in enumerate((*first.first, first.down)):
        paths = [str((*f.first, f.down)[place].target) for f in run]
        last = node is first.down
        dim = int(last != isinstance(program.layer(node), TransposedLinear))  # that one has its weight [in, out]
        edit.set_parameter(f"{paths[0]}.weight", functools.partial(_joined, dim=dim), *(f"{p}.weight" for p in paths))
        if program.layer(node).bias is not None:
            edit.set_parameter(f"{paths[0]}.bias", _summed if last else _joined, *(f"{p}.bias" for p in paths))
    edit.rewire(run[-1].branch.addition, first.branch.addition)
    others = [f.branch for f in run[1:]]
    own = (n for b in others for n in (b.addition, *b.carriers, *b.nodes) if n not in b.norms)
    edit.remove_unused([*own], first.branch.path, f"{len(others)} FFNs are part of this one")


def _joined(*parts: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return torch.cat(parts, dim)


def _summed(*parts: torch.Tensor) -> torch.Tensor:
    return torch.stack(parts).sum(0)
