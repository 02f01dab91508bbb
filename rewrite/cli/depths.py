"""How much each block adds and how one depends on another, as a table and a map of shades."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewrite.errors import RewriteError
from rewrite.pipeline.settings import Tick

from .job import Model, read_data

if TYPE_CHECKING:
    from rewrite.analysis.influence import Depth
    from rewrite.pipeline.settings import Listener

WIDEST = 64
"""How many blocks a map of shades has at most."""


def deep(model: Model, passes: tuple[str, ...], data: Path | None, listener: Listener) -> dict[str, Depth]:
    """The depth of a model on data, ``before``, and ``after`` passes if there are any.

    Raises RewriteError without data, where the model cannot be read, and as passes do.
    """
    samples = read_data(data)
    if samples is None:
        raise RewriteError("depth is told by data: give some with --data FILE")
    program, _ = model.read(listener, samples)
    from rewrite.analysis.influence import depth

    def ticking(done: int, total: int | None) -> None:
        listener(Tick(f"looking at call {done}" + f" of {total}" * (total is not None)))

    found = {"before": depth(program, samples, progress=ticking, seed=model.seed)}
    if passes:
        from rewrite.pipeline.run import apply

        after = apply(program, passes, seed=model.seed, data=samples, share=True, listener=listener)
        found["after"] = depth(after, samples, progress=ticking, seed=model.seed)
    return found


def show_depth(console: Console, found: Mapping[str, Depth]) -> None:
    """A table of the blocks for each, the map of their dependencies, the longest chain."""
    for name, each in found.items():
        if len(found) > 1:
            console.print(Text(name, "bold cyan"))
        console.print(_table(each))
        if 1 < len(each.dependency) <= WIDEST:
            console.print(_map(each))
        console.print(f"longest chain: {each.chain} products one after the other, {each.flops:.3g} FLOPs along the dearest")
    if len(found) > 1:
        before, after = found["before"], found["after"]
        share = f", {after.flops / before.flops:.0%} of the FLOPs" if before.flops else ""
        console.print(f"critical path: {before.chain} products before, {after.chain} after{share} along the dearest")


def _table(found: Depth) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    for title in ("layer", "influence", "branch", "kind", "|F| / |x|"):
        table.add_column(title, justify="right" if title in ("layer", "influence", "|F| / |x|") else "left", overflow="fold")
    for block in found.blocks:
        for i, branch in enumerate(block.branches):
            head = (str(block.layer), f"{block.influence:.4f}") if i == 0 else ("", "")
            table.add_row(*head, branch.path, branch.kind, f"{branch.contribution:.4f}")
    return table


def _map(found: Depth) -> Text:
    """M[i, j] as shades, rows i: block i taken out; columns j: what block j then adds; darkest at the largest."""
    largest = max(max(row) for row in found.dependency) or 1.0
    text = Text(f"dependency M[i, j] of block j (column) on block i (row), 0 to {largest:.3g}\n", "dim")
    for i, row in enumerate(found.dependency):
        text.append(f"{found.blocks[i].layer:4d} ", "dim")
        for j, value in enumerate(row):
            shade = " ░▒▓█"[min(4, int(5 * max(value, 0.0) / largest))] if j > i else "·"
            text.append(shade * 2)
        text.append("\n")
    return text
