"""What data tells of a model's depth as a picture: how blocks depend on each other as a heat map, what each branch adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pictures import check_picture, new_figure, write_picture

if TYPE_CHECKING:
    from rewrite.analysis.influence import Depth


def draw_depth(found: Mapping[str, Depth], file: Path) -> None:
    """Write the picture, one row before and one after passes. Raises RewriteError as ``check_picture`` does."""
    check_picture(file)
    figure = new_figure(11, 4.6 * len(found))
    panels = figure.subplots(len(found), 2, squeeze=False)
    largest = max((value for each in found.values() for row in each.dependency for value in row), default=0.0)
    for (name, each), (left, right) in zip(found.items(), panels, strict=True):
        shown = left.imshow(_matrix(each), cmap="magma_r", vmin=0.0, vmax=max(largest, 1e-9))
        figure.colorbar(shown, ax=left, label="M[i, j]")
        layers = [str(block.layer) for block in each.blocks]
        left.set_xticks(range(len(layers)), layers)
        left.set_yticks(range(len(layers)), layers)
        left.set(xlabel="what block j adds ...", ylabel="... depends on block i")
        left.set_title(f"{name}: {each.chain} products in a row, {each.flops:.3g} FLOPs along the dearest", fontsize=10)
        _bars(right, each)
    write_picture(figure, file)


def _matrix(found: Depth) -> list[list[float]]:
    """M[i, j], nan where j does not follow i: those squares stay empty."""
    size = len(found.dependency)
    return [[found.dependency[i][j] if j > i else float("nan") for j in range(size)] for i in range(size)]


def _bars(axes: Any, found: Depth) -> None:
    """The contribution of each branch, by kind, and the influence of each block."""
    kinds = list(dict.fromkeys(branch.kind for block in found.blocks for branch in block.branches))
    width = 0.8 / max(len(kinds), 1)
    for place, kind in enumerate(kinds):
        pairs = [(i, b.contribution) for i, block in enumerate(found.blocks) for b in block.branches if b.kind == kind]
        axes.bar(
            [i - 0.4 + (place + 0.5) * width for i, _ in pairs],
            [value for _, value in pairs],
            width,
            label=f"|F| / |x|, {kind}",
        )
    axes.plot([block.influence for block in found.blocks], "k.-", label="influence")
    axes.set_xticks(range(len(found.blocks)), [str(block.layer) for block in found.blocks])
    axes.set_xlabel("layer")
    axes.legend(fontsize=8)
