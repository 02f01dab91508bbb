"""FFNs one after the other as one wide FFN."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewrite.analysis.blocks import Block
from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.ffns import FFN, FFNs
from rewrite.analysis.influence import dependencies
from rewrite.analysis.norms import norm_of
from rewrite.analysis.windows import cut
from rewrite.errors import OptionError, RewriteError
from rewrite.graph.fakes import same_shape
from rewrite.graph.layers import TransposedLinear
from rewrite.pipeline.beginning import behind
from rewrite.pipeline.numbers import numbers
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.registry import get_pass
from rewrite.proof.contract import CLOSE, NEW, SAME, Contract

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
    norm serves all; the projections become one: up and gate below each other (by halves, where one projection is both), down
    side by side, biases added, under the names of the run's first FFN. Drop attention first: a run is of FFNs that nothing
    else stands between.

    With data a run longer than `window`, or one of FFNs that depend on each other, is cut by M_ij = 1 - mean cos(h_j, h_j
    without i), h what an FFN adds: into as few parts as can be, of least Σ M_ij within them, none with an M_ij above
    `dependency`. Without data it is cut at `window`.

    Dropout of equal rates goes along. Behind the activation each hidden unit is dropped by a draw of its own, as before.
    Behind the last projection one draw serves the sum, where each FFN had its own: the mean is the same, the distribution
    is another, so that of the last step only evaluation is promised then. So it is with stochastic depth of equal rates: a
    sample keeps all FFNs of a run or none. Without either training is held as well.

    Left alone, with the reason: norms after the addition, FFNs unlike each other (other rates of dropout or stochastic
    depth too).

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
        finder = FFNs(program)
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


def _runs(ffns: Sequence[Branch], chosen: Sequence[int], finder: FFNs, context: Context) -> Iterator[list[Branch]]:
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
    redrawn: bool = option(False, "one draw drops of the sum where each FFN had its own: training is not the same")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME, evaluation_only=self.redrawn)

    def run(self, program: Program, context: Context) -> None:
        finder = FFNs(program)
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
        halves = 1 if last else first.halves
        joined = functools.partial(_joined, dim=dim, halves=halves)
        edit.set_parameter(f"{paths[0]}.weight", joined, *(f"{p}.weight" for p in paths))
        if program.layer(node).bias is not None:
            bias = _summed if last else functools.partial(_joined, halves=halves)
            edit.set_parameter(f"{paths[0]}.bias", bias, *(f"{p}.bias" for p in paths))
    edit.rewire(run[-1].branch.addition, first.branch.addition)
    others = [f.branch for f in run[1:]]
    own = (n for b in others for n in (b.addition, *b.carriers, *b.nodes) if n not in b.norms)
    edit.remove_unused([*own], first.branch.path, f"{len(others)} FFNs are part of this one")


def _joined(*parts: torch.Tensor, dim: int = 0, halves: int = 1) -> torch.Tensor:
    """All first halves, then all second ones."""
    cut = [part.chunk(halves, dim) for part in parts]
    return torch.cat([pieces[half] for half in range(halves) for pieces in cut], dim)


def _summed(*parts: torch.Tensor) -> torch.Tensor:
    return torch.stack(parts).sum(0)
