"""The logical dimensions of a model as a table: name, size, how it is used, what lies along it or why it cannot change."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewrite.errors import RewriteError

from .job import Model

if TYPE_CHECKING:
    from rewrite.axes import table as axes
    from rewrite.pipeline.settings import Listener


def analyzed(model: Model, check: bool, listener: Listener) -> tuple[axes.Table, int | None]:
    """The dimensions of a model and, where ``check``, how many of them were set to primes at once and fitted.

    Raises RewriteError where the model cannot be read, and for the first value that does not fit.
    """
    program, _ = model.read(listener)
    from rewrite.axes.analyze import analyze
    from rewrite.axes.check import check as checked
    from rewrite.graph.edit import Editor

    listener("finding dimensions")
    table = analyze(program)
    if not check:
        return table, None
    listener("setting each to a prime")
    try:
        return table, checked(Editor(program.clone(), "check"))
    except RewriteError as error:
        raise RewriteError(f"the check failed, with every dimension at a prime of its own: {error}") from None


def show_axes(console: Console, found: axes.Table, checked: int | None) -> None:
    """One row a dimension; those that cannot change last, by reason."""
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    for title in ("dimension", "size", "used in", "along it"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for name, dim in found.named.items():
        if not dim.rigid and dim.size > 1:
            roles = Counter(place.role for place in dict.fromkeys(found.places_of(dim)) if place.role != "value")
            along = ", ".join(f"{count} {role}" for role, count in roles.most_common())
            table.add_row(Text(name, "bold cyan"), str(dim.size), ", ".join(sorted(dim.uses)), along)
    table.add_section()
    for name, dim in found.named.items():
        if dim.rigid:
            table.add_row(Text(name, "dim"), str(dim.size), Text("cannot change", "yellow"), dim.rigid)
    console.print(table)
    if found.unknown:
        console.print(f"no rule for {', '.join(found.unknown)}: what they touch cannot change")
    if checked is not None:
        console.print(
            f"checked: {checked} dimensions set to primes of their own at once, and every value fits", style="green"
        )
