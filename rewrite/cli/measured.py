"""What a model keeps for its backward, as a table: by kind of layer and by the layers that keep most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .job import Model, read_data

if TYPE_CHECKING:
    from rewrite.pipeline.settings import Listener
    from rewrite.training.baselines import Ways
    from rewrite.training.saved import Memory


@dataclass(frozen=True)
class Frontier:
    """The best plans of several sizes that a pass found: what each keeps of eager, its seconds more, the noise it makes."""

    plans: tuple[Mapping[str, Any], ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Everything as plain JSON values."""
        return [dict(plan) for plan in self.plans]


NAMED = 8
"""How many layers are named before "and 21 more"."""


def measured(
    model: Model, passes: tuple[str, ...], backend: str, data: Path | None, listener: Listener, *, baselines: bool = True
) -> dict[str, Memory | Ways | Frontier]:
    """The memory of a model, ``before``, and ``after`` passes if there are any, with the ``frontier`` of plans that one
    noted; the ``ways`` of training it side by side.

    Raises RewriteError where the model cannot be read, and as passes do.
    """
    samples = read_data(data)
    program, _ = model.read(listener, samples)
    from rewrite.training.saved import memory

    listener("measuring")
    found: dict[str, Memory | Ways | Frontier] = {"before": memory(program, backend=backend, seed=model.seed)}
    after = None
    if passes:
        from rewrite.pipeline.run import apply

        after = apply(program, passes, seed=model.seed, data=samples, share=True, listener=listener)
        listener("measuring again")
        found["after"] = memory(after, backend=backend, seed=model.seed)
        plans = tuple(row.figures for record in after.history for row in record.measured if row.path == "frontier")
        if plans:
            found["frontier"] = Frontier(plans)
    if baselines:
        from rewrite.training.baselines import compared

        listener("training in other ways")
        found["ways"] = compared(program, after, seed=model.seed)
    return found


def memories(found: Mapping[str, Any]) -> dict[str, Memory]:
    """What was measured before and after passes."""
    return {name: each for name, each in found.items() if name in ("before", "after")}


def show_memory(console: Console, found: Mapping[str, Any]) -> None:
    """The kinds and the layers that keep most, in KiB, with the ratio where there is a before and an after; the ways."""
    kept = memories(found)
    for title, sums in (
        ("kind", {name: each.by_kind() for name, each in kept.items()}),
        ("layer", {name: each.by_path() for name, each in kept.items()}),
    ):
        console.print(_table(title, sums, {name: each.bytes for name, each in kept.items()}))
    if "ways" in found:
        console.print(_ways(found["ways"]))


def _ways(ways: Ways) -> Table:
    """A row for each way of training: what it keeps, its peak, its time."""
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    for column in ("a step of training", "kept, KiB", "times less", "peak, KiB", "ms"):
        table.add_column(column, justify="left" if column.startswith("a") else "right", overflow="fold")
    for way in ways.rows:
        if way.problem:
            table.add_row(way.name, way.problem)
            continue
        less = f"{ways.rows[0].bytes / way.bytes:.2f}" if way.bytes else ""
        table.add_row(way.name, _kib(way.bytes), less, _kib(way.peak), f"{1e3 * way.seconds:.1f}")
    return table


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
