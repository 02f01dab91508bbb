"""What a model keeps for its backward, as a table: by kind of layer and by the layers that keep most."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from .job import Model, read_data

if TYPE_CHECKING:
    from rewrite.pipeline.settings import Listener
    from rewrite.training.saved import Memory

NAMED = 8
"""How many layers are named before "and 21 more"."""


def measured(
    model: Model, passes: tuple[str, ...], backend: str, data: Path | None, listener: Listener
) -> dict[str, Memory]:
    """The memory of a model, ``before``, and ``after`` passes if there are any.

    Raises RewriteError where the model cannot be read, and as passes do.
    """
    samples = read_data(data)
    program, _ = model.read(listener, samples)
    from rewrite.training.saved import memory

    listener("measuring")
    found = {"before": memory(program, backend=backend, seed=model.seed)}
    if passes:
        from rewrite.pipeline.run import apply

        after = apply(program, passes, seed=model.seed, data=samples, share=True, listener=listener)
        listener("measuring again")
        found["after"] = memory(after, backend=backend, seed=model.seed)
    return found


def show_memory(console: Console, found: Mapping[str, Memory]) -> None:
    """Two tables, the kinds and the layers that keep most, in KiB; with the ratio where there is a before and an after."""
    for title, sums in (
        ("kind", {name: each.by_kind() for name, each in found.items()}),
        ("layer", {name: each.by_path() for name, each in found.items()}),
    ):
        console.print(_table(title, sums, {name: each.bytes for name, each in found.items()}))


def _table(title: str, sums: Mapping[str, Mapping[str, int]], totals: Mapping[str, int]) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    table.add_column(title, overflow="fold")
    for name in sums:
        table.add_column("kept, KiB" if len(sums) == 1 else f"{name}, KiB", justify="right")
    keys = list(dict.fromkeys(key for column in sums.values() for key in column))
    shown = keys if title == "kind" else keys[:NAMED]
    for key in shown:
        table.add_row(key or "(the model)", *(_kib(column.get(key, 0)) for column in sums.values()))
    if len(keys) > len(shown):
        rest = keys[len(shown) :]
        count = f"and {len(rest)} more"
        table.add_row(count, *(_kib(sum(column.get(key, 0) for key in rest)) for column in sums.values()))
    table.add_section()
    ratio = f" ({totals['before'] / totals['after']:.2f} times less)" if totals.get("after") else ""
    table.add_row(f"total{ratio}", *(_kib(total) for total in totals.values()))
    return table


def _kib(count: int) -> str:
    return f"{count / 1024:,.1f}"
