"""Records, passes and programs as text for a terminal or a pipe; the data is that of the JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewrite.errors import one_lined
from rewrite.pipeline.text import Element, print_pipeline

from .job import parameter_count

if TYPE_CHECKING:
    from rewrite.graph.history import Check, Measured, Record, Verification
    from rewrite.graph.program import Program

    from .job import Outcome

NAMED = 4
"""How many module paths are named before "and 21 more"."""
_NUMBER, _NAME = re.compile(r"\d+"), re.compile(r"(?<=_)\d+")
"""What differs between places that are alike, in their paths and in the names of operators."""
FIGURES = ("output error", "site error")
"""Checks that measure and cannot fail."""


# ---- apply ---------------------------------------------------------------------------------------------------


def show_outcome(console: Console, outcome: Outcome) -> None:
    """What a run did, pass by pass, and where the result is."""
    program, spec = outcome.program, one_lined(outcome.job.model.spec)
    console.print(headline(outcome.before, captured=not outcome.job.model.is_program))
    if outcome.records:
        console.print(records_table(outcome.records))
    if program.opaque:
        count = len(program.opaque)
        console.print(
            f"{_number(count, 'part')} passes cannot see into: rewrite show {one_lined(spec)}",
            style="yellow",
            soft_wrap=True,
        )
    for note in program.origin.notes:
        console.print(Text(f"note: {note}", "yellow"))
    _show_written(console, outcome)
    if outcome.job.report is not None:
        console.print(Text.assemble("report ", (str(outcome.job.report), "bold green")), soft_wrap=True)


def show_verification(console: Console, found: Verification) -> None:
    """Each check of two models by name, with what it says, and whether all hold."""
    for check in found.checks:
        mark, style = ("holds ", "green") if check.passed else ("BROKEN", "bold red")
        console.print(
            Text.assemble((mark, style), f" {check.name}", f": {check.detail}" * bool(check.detail)), soft_wrap=True
        )


def _show_written(console: Console, outcome: Outcome) -> None:
    written = outcome.written
    if written is None:
        passes = "the pass" if len(outcome.records) == 1 else "the passes"
        console.print(Text(f"nothing is written: {passes} changed nothing, and the model stays what it was", "yellow"))
        return
    if written.reason:
        console.print(Text(f"not your own class again: {written.reason}", "yellow"))
    verb = "dry run, would write " if outcome.job.dry_run else "wrote "
    console.print(Text.assemble(verb, (one_lined(str(written.path)), "bold green"), f": {written.kind}"), soft_wrap=True)


def headline(program: Program, *, captured: bool) -> Text:
    """The model's class and size, and how long its capture took."""
    took = f", captured in {sum(program.origin.seconds.values()):.1f} s" if captured else ""
    name = program.origin.model_class.rpartition(".")[2]
    return Text.assemble((name, "bold"), f", {parameter_count(program):,} parameters{took}")


def records_table(records: Sequence[Record]) -> Table:
    """One section a pass: what it changed, what it left alone and why, what was proven, figures and warnings."""
    return two_columns(*(_record_rows(record) for record in records))


def two_columns(*sections: Iterable[tuple[str, RenderableType]]) -> Table:
    """Titles and contents in two columns, a rule between sections."""
    table = Table(box=box.HORIZONTALS, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for section in sections:
        table.add_section()
        for title, content in section:
            table.add_row(title, content)
    return table


def _record_rows(record: Record) -> Iterator[tuple[str, RenderableType]]:
    yield "pass", Text(record.text, "bold cyan")
    yield "promises", record.contract
    for number, step in enumerate(record.steps, 1):
        yield f"step {number}", Text(step.text, "bold cyan")
        yield "promises", step.contract
        yield from _changed_and_proven(step)
    if not record.steps:
        yield from _changed_and_proven(record)
    if record.skipped:
        yield "left alone", by_reason((skipped.path, skipped.reason) for skipped in record.skipped)
    if record.measured:
        yield "measured", measured_table(record.measured)
    yield "parameters", _parameters(*record.parameters)
    yield "seconds", _seconds(record)
    for warning in record.warnings:
        yield "warning", Text(warning, "yellow")


def _changed_and_proven(record: Record) -> Iterator[tuple[str, RenderableType]]:
    yield "changed", _changed(record)
    yield "proven", _proven(record.verification)
    if record.verification is not None:
        for check in record.verification.checks:
            if check.name in FIGURES and check.error is not None:
                yield check.name, f"{check.error:.3g} ({check.detail})"


def measured_table(measured: Sequence[Measured]) -> RenderableType:
    """What a pass measured at each place: one row a place, one column a name, a table for each kind of row.

    Rows that say the same of places whose names differ in numbers alone are one row, with their count.
    """
    kinds: dict[tuple[str, ...], list[Measured]] = {}
    for each in measured:
        kinds.setdefault(tuple(each.figures), []).append(each)
    return Group(*(_measured_rows(names, rows) for names, rows in kinds.items()))


def _measured_rows(names: Sequence[str], rows: Sequence[Measured]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("place", *names):
        is_text = name == "place" or any(isinstance(each.figures[name], str) for each in rows)
        table.add_column(name, overflow="fold", justify="left" if is_text else "right")
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for each in rows:
        cells = (each.path, *(_figure(each.figures[name]) for name in names))
        like = (_NUMBER.sub("*", each.path), *(_NAME.sub("*", cell) for cell in cells[1:]))
        groups.setdefault(like, []).append(cells)
    for like, members in groups.items():
        table.add_row(*(members[0] if len(members) == 1 else (f"{len(members)} of {like[0]}", *like[1:])))
    return table


def _figure(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _changed(record: Record) -> RenderableType:
    if record.changes:
        return by_reason((site.path, f"{site.kind}: {site.detail}".rstrip(": ")) for site in record.changes)
    return Text("nothing" if record.skipped else "nothing: the model has no place for this pass", "yellow")


def by_reason(pairs: Iterable[tuple[str, str]]) -> RenderableType:
    """`25  LayerNorm -> DynamicTanh` and below it some of the paths, for each reason, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for path, reason in pairs:
        groups.setdefault(reason, []).append(path)
    lines: list[RenderableType] = []
    for reason, paths in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(Text.assemble((f"{len(paths)}", "bold"), f" {reason}"))
        lines.append(Padding(Text(some(paths), "dim"), (0, 0, 0, len(f"{len(paths)} "))))
    return Group(*lines)


def some(paths: Sequence[str]) -> str:
    """`blocks.0.norm1, blocks.0.norm2 and 23 more`."""
    named = [path or "(the model)" for path in dict.fromkeys(paths)]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(named[:NAMED]) + more


def _proven(verification: Verification | None) -> Text:
    if verification is None:
        return Text("nothing: --no-verify", "yellow")
    parts = [_check(check) for check in verification.checks if check.name not in FIGURES]
    return Text(", ").join(parts)


def _check(check: Check) -> Text:
    if check.detail.startswith("not checked"):
        return Text(f"{check.name} {check.detail}", "yellow")
    told = f" ({check.detail})" if check.detail else ""
    return Text.assemble((check.name, "green" if check.passed else "red"), told)


def _parameters(before: int, after: int) -> str:
    return f"{before:,}, none added or removed" if before == after else f"{before:,} -> {after:,} ({after - before:+,})"


def _seconds(record: Record) -> str:
    verified = "" if record.verification is None else f", verified in {record.verification.seconds:.2f}"
    return f"{record.seconds:.2f}{verified}"


# ---- passes --------------------------------------------------------------------------------------------------


def show_passes(console: Console, passes: Sequence[Mapping[str, Any]]) -> None:
    """All passes with their summaries."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for each in passes:
        table.add_row(each["name"], Text(each["error"], "red") if "error" in each else Text(each["summary"]))
    console.print(table)
    console.print()
    console.print("rewrite passes NAME tells more of one.", style="dim")


def show_pass(console: Console, described: Mapping[str, Any]) -> None:
    """One pass: its documentation, what it promises, its options."""
    summary, _, rest = described["doc"].partition("\n")
    console.print(Text.assemble((described["name"], "bold cyan"), "  ", (summary, "bold")))
    for paragraph in rest.strip("\n").split("\n\n"):
        if paragraph.strip():
            console.print()
            console.print(Text(_reflowed(paragraph)))
    contract = described["contract"]
    console.print()
    promises = f"forward {contract['forward']}, backward {contract['backward']}"
    console.print(Text.assemble(("promises ", "bold"), promises))
    options = described["options"]
    if options:
        console.print(_options_table(options))
    example = Element(described["name"], tuple((option["name"], option["default"]) for option in options))
    console.print(Text.assemble(("by default ", "bold"), print_pipeline([example])), soft_wrap=True)


def _options_table(options: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    for title in ("option", "type", "default", ""):
        table.add_column(title, style="bold" if title == "option" else "")
    for option in options:
        accepted = f" ({option['accepts']})" if option["accepts"] else ""
        words = (option["name"], option["type"], option["default"], option["help"] + accepted)
        table.add_row(*map(Text, words))
    return table


def _reflowed(paragraph: str) -> str:
    """One line for the terminal to wrap, unless its lines are set by hand."""
    lines = paragraph.splitlines()
    return paragraph if any(line.startswith((" ", "-")) for line in lines) else " ".join(lines)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)
