"""How much each branch and block of a model adds on given data, and how much one depends on another.

For a block with input x, output y and branches F: contribution |F(x)| / |x|, influence 1 - mean cos(x, y) over positions
(Men et al., "ShortGPT", arXiv 2403.03853), and dependency M[i, j] = 1 - mean cos(h_j, h_j without i), where h_j = y_j - x_j
is what block j adds (Bercovich et al., "FFN Fusion", arXiv 2503.18908, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewrite.errors import RewriteError
from rewrite.graph.program import Program

from .blocks import Block, blocks_of
from .branches import branches
from .costs import depth_of, flops
from .observe import Progress, observe, replay
from .view import critical_path


@dataclass(frozen=True)
class BranchInfluence:
    """One branch: ``contribution`` is the root mean square of F(x) over that of x, at the values that it is added to."""

    layer: int
    path: str
    kind: str
    contribution: float


@dataclass(frozen=True)
class BlockInfluence:
    """One block: ``influence`` is 1 - mean cosine of its input and output; its branches in order."""

    layer: int
    influence: float
    branches: tuple[BranchInfluence, ...]


@dataclass(frozen=True)
class Depth:
    """What data tells of a model's depth.

    ``dependency[i][j]`` is M of the blocks (the i-th removed, the j-th looked at), 0 where j does not follow i, and empty
    where it was not asked for. ``chain`` is the longest row of matrix products that wait for each other, ``flops`` those of
    the dearest row, at the example's sizes.
    """

    blocks: tuple[BlockInfluence, ...]
    dependency: tuple[tuple[float, ...], ...]
    chain: int
    flops: float
    calls: int

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        blocks = [
            {
                "layer": block.layer,
                "influence": block.influence,
                "branches": [vars(branch) for branch in block.branches],
            }
            for block in self.blocks
        ]
        chain = {"steps": self.chain, "flops": self.flops}
        return {"blocks": blocks, "dependency": [list(row) for row in self.dependency], "chain": chain, "calls": self.calls}


def depth(
    program: Program,
    data: Any,
    *,
    dependency: bool = True,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
) -> Depth:
    """How much each branch and block adds on ``data``, and how much one depends on another.

    Contribution and influence take one pass over the data. ``dependency`` runs the rest of the model once more for each
    block, with the block taken out. ``data`` is what ``rewrite.apply(data=)`` takes.

    Raises RewriteError for a model without residual branches, and for data that does not fit.
    """
    blocks = blocks_of(branches(program))
    if not blocks:
        raise RewriteError("the model has no residual branches to tell of: rewrite show tells what there is")
    sums: dict[Any, Any] = {(b.addition, b.other): _Contribution() for block in blocks for b in block.branches}
    ends: dict[Any, Any] = {(block.start, block.end): _Cosine() for block in blocks if block.start is not block.end}
    counter = _Counted(progress)
    observe(program, {**sums, **ends}, data, progress=counter, seed=seed)
    found = dependencies(program, blocks, data, seed) if dependency else ()
    steps = critical_path(program, lambda node: depth_of(program, node))[1]
    work = critical_path(program, lambda node: flops(program, node))[1]
    return Depth(tuple(_told(block, sums, ends) for block in blocks), found, round(steps), work, counter.calls)


def _told(block: Block, sums: dict[Any, Any], ends: dict[Any, Any]) -> BlockInfluence:
    own = tuple(BranchInfluence(b.layer, b.path, b.kind, sums[b.addition, b.other].value) for b in block.branches)
    return BlockInfluence(block.layer, 1.0 - ends[block.start, block.end].mean, own)


class _Contribution:
    """√(Σ|y - x|²) / √(Σ|x|²) of pairs (y, x)."""

    def __init__(self) -> None:
        self.added = self.base = 0.0

    def update(self, *values: torch.Tensor) -> None:
        total, before = (v.detach().double() for v in values)
        self.added += float((total - before).square().sum())
        self.base += float(before.square().sum())

    @property
    def value(self) -> float:
        return (self.added / self.base) ** 0.5 if self.base else 0.0


class _Cosine:
    """The mean cosine of pairs of rows (the last axis, or the channels of a map)."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, *values: torch.Tensor) -> None:
        x, y = (_rows(v) for v in values)
        if x.shape == y.shape:
            found = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            self.total += float(found.sum())
            self.count += found.numel()

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 1.0


def _rows(value: torch.Tensor) -> torch.Tensor:
    wide = value.detach().double()
    return wide.movedim(1, -1) if wide.dim() == 4 else wide


class _Counted:
    """Passes progress on, and keeps the number of calls."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.calls = progress, 0

    def __call__(self, done: int, total: int | None) -> None:
        self.calls = done
        self.progress(done, total)


def dependencies(program: Program, blocks: Sequence[Block], data: Any, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """M[i, j] of blocks in order, from one run of each call and one more of what follows each block, that one taken out."""
    size = len(blocks)
    cosines = {(i, j): _Cosine() for i in range(size) for j in range(i + 1, size)}
    watched = [node for block in blocks for node in (block.start, block.end)]

    def seen(i: int, base: Mapping[Node, torch.Tensor], without: Mapping[Node, torch.Tensor]) -> None:
        for j in range(i + 1, size):
            start, end = blocks[j].start, blocks[j].end
            cosines[i, j].update(base[end] - base[start], without[end] - without[start])

    replay(program, watched, data, [(block.end, block.start) for block in blocks[:-1]], seen, seed=seed)
    rows = [[1.0 - cosines[i, j].mean if j > i else 0.0 for j in range(size)] for i in range(size)]
    return tuple(tuple(row) for row in rows)
