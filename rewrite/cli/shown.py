"""A program as text for a terminal or a pipe: what passes see of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.text import Text

from .render import by_reason, headline, two_columns

if TYPE_CHECKING:
    from rewrite.analysis.branches import Branch
    from rewrite.graph.program import Program


def show_program(console: Console, program: Program, *, captured: bool) -> None:
    """The layer graph at a glance: inputs, layers by type, norms, what passes cannot see, notes, history.

    ``captured`` says whether this run did that, and so whether its seconds are of interest.
    """
    console.print(headline(program, captured=captured))
    console.print(two_columns(_sections(program)))


def _sections(program: Program) -> Iterator[tuple[str, RenderableType]]:
    yield "class", program.origin.model_class
    yield "tensors", _tensors(program)
    yield "inputs", Group(*_inputs(program))
    yield "layers", _counted(_layer_types(program))
    yield "functions", _counted(_function_names(program))
    yield "norms", Group(*_norms(program) or [Text("no LayerNorm or RMSNorm in any spelling")])
    yield from _structure(program)
    parts = [Text.assemble((part.path or "(the model)", "bold"), f" {part.kind}: {part.reason}") for part in program.opaque]
    yield "opaque", Group(*parts or [Text("nothing: passes see every part")])
    for note in program.origin.notes:
        yield "note", Text(note, "yellow")
    for record in program.history:
        yield "history", Text(record.text, "cyan")


def _tensors(program: Program) -> Text:
    parameters = list(program.module.parameters())
    buffers = sum(buffer.numel() for buffer in program.module.buffers())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    dtypes = Counter({str(p.dtype).removeprefix("torch."): 0 for p in parameters})
    for parameter in parameters:
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    names = ", ".join(name for name, _ in dtypes.most_common())
    extra = [f"{frozen:,} frozen"] * bool(frozen) + [f"{buffers:,} in buffers"] * bool(buffers)
    return Text(", ".join([f"{sum(dtypes.values()):,} {names}".strip(), *extra]))


def _inputs(program: Program) -> list[RenderableType]:
    """`x float32 [2 dynamic, 3, 224, 224]`, one line an input."""
    shapes: dict[str, list[str]] = {}
    dtypes: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            shapes[node.name] = []
            dtypes[node.name] = str(getattr(node.meta.get("val"), "dtype", "")).removeprefix("torch.")
    for dimension in program.dimensions:
        mark = " dynamic" if dimension.dynamic else ""
        shapes.setdefault(dimension.input, []).append(f"{dimension.size}{mark}")
    return [Text.assemble((name, "bold"), f" {dtypes.get(name, '')} [{', '.join(sizes)}]") for name, sizes in shapes.items()]


def _layer_types(program: Program) -> Counter[str]:
    return Counter(type(layer).__name__ for _, layer in program.layers())


def _function_names(program: Program) -> Counter[str]:
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    names = (getattr(call, "__name__", str(call)) for call in calls)
    return Counter(name.removesuffix(".default") for name in names)


def _counted(counts: Counter[str]) -> Text:
    parts = [Text.assemble((str(count), "bold"), f" {name}") for name, count in counts.most_common()]
    return Text(", ").join(parts) if parts else Text("none")


def _norms(program: Program) -> list[RenderableType]:
    from rewrite.analysis.norms import norms

    groups: dict[str, list[str]] = {}
    for norm in norms(program):
        kind = norm.types[-1] or norm.layer_name
        spelled = "" if kind == norm.layer_name else f" ({norm.layer_name})"
        eps = "" if norm.eps is None else f" eps {norm.eps:g}"
        groups.setdefault(f"{kind}{spelled} {list(norm.shape)}{eps}", []).append(norm.path)
    return [by_reason((path, kind) for path in paths) for kind, paths in groups.items()]


def _structure(program: Program) -> Iterator[tuple[str, RenderableType]]:
    """The residual streams by their width, and their branches by kind, each with the number of its layer."""
    from rewrite.analysis.branches import branches
    from rewrite.analysis.streams import streams

    found = streams(program)
    if not found:
        return
    widths = Counter(f"of {stream.size}" for stream in found)
    yield "streams", Text(", ").join(Text.assemble((str(count), "bold"), f" {width}") for width, count in widths.items())
    named = ((f"{b.layer}: {b.path}", _manner(b)) for b in branches(program, found))
    yield "branches", by_reason(named)


_MANNERS = {"none": "without a norm", "inner": "norm within"}


def _manner(branch: Branch) -> str:
    """`attention, pre-norm, parallel, scaled`."""
    words = [branch.kind, _MANNERS.get(branch.order, f"{branch.order}-norm")]
    words += ["parallel"] * branch.parallel + ["scaled"] * (branch.scale is not None)
    return ", ".join(words)
