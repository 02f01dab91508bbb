"""Attention and FFN of a block side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.norms import Norm, norm_of
from rewrite.analysis.writes import Writes
from rewrite.errors import OptionError, RewriteError
from rewrite.pipeline.beginning import begin, behind, fits, own_reshapes
from rewrite.pipeline.numbers import numbers
from rewrite.pipeline.pass_ import Pass, option
from rewrite.proof.contract import CLOSE, NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

ALL = "all"


@dataclass(frozen=True)
class ParallelBlock(Pass):
    """Let attention and FFN of a block read the same value: x + Attn(N x) + FFN(N' x), where FFN read x + Attn(N x).

    In two steps. The FFN reads what the attention reads: an approximation, whose error at each FFN's input is measured and
    held against `bound`; the model wants healing afterwards. Then one norm serves both where they are the same: without
    weight and bias (`fold-affine` before it sees to that), with one eps. `merge-linears` afterwards makes their
    projections one.

    Left alone, with the reason: blocks with norms after the additions, with another branch between the two, or whose
    stream is written in place.

    Source: Wang and Komatsuzaki, GPT-J-6B (2021); Chowdhery et al., "PaLM", JMLR 2023 (arXiv 2204.02311), section 2.
    """

    name = "parallel-block"
    absence = "no FFN is added to a residual stream"
    layers: str = option(ALL, "numbers of the layers, as `rewrite show` counts them: '1,2' or '0-3,8'; or all")
    bound: float = option(1.0, "largest error of what an FFN reads, relative, root mean square", above=0, finite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _numbers(self.layers)
        except RewriteError as error:
            raise OptionError(f"option 'layers' of pass '{self.name}': {error}", "layers") from None

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        every, chosen, writes = branches(program), _numbers(self.layers), Writes(program.graph, program.module)
        last = max((b.layer for b in every), default=-1)
        if chosen is not None and every and chosen[-1] > last:
            raise RewriteError(f"layers={self.layers}: the model has layers 0 to {last}")
        found = []
        for ffn in (b for b in every if b.kind in ("ffn", "gated ffn")):
            reason = _obstacle(ffn, every, writes)
            if chosen is not None and ffn.layer not in chosen:
                reason = f"layer {ffn.layer} is not among layers={self.layers}"
            if reason:
                context.skip(ffn.path, reason)
            else:
                found.append(ffn)
        moved = [(ffn, attention.starts[0]) for ffn in found if (attention := _attention(ffn, every)) is not None]
        text = ",".join(str(ffn.layer) for ffn in found)
        return [*own_reshapes(moved), _Reroute(text, self.bound), ShareNorms(text)] if found else []


def _numbers(layers: str) -> tuple[int, ...] | None:
    return None if layers == ALL else numbers(layers)


def _attention(ffn: Branch, every: Sequence[Branch]) -> Branch | None:
    """The attention that adds to the stream right before an FFN reads it, in whatever shape."""
    before = behind(ffn.starts[0])[-1] if len(ffn.starts) == 1 else None
    return next((b for b in every if b.kind == "attention" and before is b.addition), None)


def _obstacle(ffn: Branch, every: Sequence[Branch], writes: Writes) -> str:
    """Why an FFN must stay behind what it reads; empty if nothing stands in the way."""
    attention = _attention(ffn, every)
    if ffn.order == "post":
        return "its norm stands after the addition"
    if ffn.parallel:
        return "it stands beside another branch already"
    if attention is None:
        return "it does not read the sum of an attention"
    if attention.order == "post" or len(attention.starts) != 1:
        return f"{attention.path}, which it would stand beside, is not normalized at its start alone"
    if writes.into(attention.starts[0]):
        return "the stream is written in place"
    return "" if fits(ffn.starts[0], attention.starts[0]) else "its stream has another shape there"


@dataclass(frozen=True)
class _Reroute(Pass):
    """Let the FFNs of some layers read what the attention before them reads."""

    name = "ffn-beside-attention"
    layers: str = option("", "numbers of the layers")
    bound: float = option(1.0, "largest error of what an FFN reads, relative, root mean square")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        every, chosen = branches(program), numbers(self.layers)
        for ffn in (b for b in every if b.layer in chosen and b.kind in ("ffn", "gated ffn")):
            attention = _attention(ffn, every)
            if attention is not None:
                begin(context.edit, ffn, attention.starts[0])


@dataclass(frozen=True)
class ShareNorms(Pass):
    """Let one norm serve all branches of some layers that read one value through the same norm."""

    name = "share-norms"
    layers: str = option("", "numbers of the layers")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        chosen = numbers(self.layers)
        kept: dict[Node, Norm] = {}
        for norm in _norms([b for b in branches(program) if b.layer in chosen and b.parallel], program):
            first = kept.setdefault(norm.node.args[0], norm)  # type: ignore[arg-type]
            if first is norm:
                continue
            reason = _unlike(first, norm)
            if reason:
                context.skip(norm.path, f"{first.path} cannot serve for it: {reason}")
            else:
                context.edit.rewire(norm.node, first.node)
                context.edit.remove(norm.node)
        context.edit.sweep()


def _norms(found: Sequence[Branch], program: Program) -> Iterator[Norm]:
    nodes = dict.fromkeys(n for b in found for n in b.norms)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    yield from (norm for n in sorted(nodes, key=order.__getitem__) if (norm := norm_of(program, n)) is not None)


def _unlike(a: Norm, b: Norm) -> str:
    if any(norm.weight is not None or norm.bias is not None for norm in (a, b)):
        return "they have weights of their own; fold-affine before this pass takes them out"
    same = (a.kind, a.shape, a.eps, a.channel_axis) == (b.kind, b.shape, b.eps, b.channel_axis)
    return "" if same else "they are different norms"
