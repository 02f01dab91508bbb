"""The command line: it parses, calls the engine and prints.

Everything that costs time is imported inside the commands, so that `rewrite --help` is quick.
"""

import gc
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rewrite import __version__
from rewrite.errors import RewriteError

from .ending import one_line
from .options import (
    MODEL_HELP,
    AsJson,
    CheckpointFile,
    Data,
    Inputs,
    Loss,
    ModelName,
    NoVerify,
    Passes,
    Pipeline,
    Rate,
    Seed,
    TrustPickle,
    Weights,
    complete_pass,
)

if TYPE_CHECKING:
    from rich.console import Console

    from .job import Job
    from .progress import Steps


FULL = "--traceback"


class Commands(TyperGroup):
    """Ends every run that goes wrong with one line and an exit code; takes `--traceback` wherever it stands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[FULL] = FULL in args
        if not args:
            return super().parse_args(ctx, args)  # shows the help
        with one_line(full=ctx.meta[FULL]):
            return super().parse_args(ctx, [word for word in args if word != FULL])

    def invoke(self, ctx: Any) -> Any:
        with one_line(full=ctx.meta[FULL]):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # it costs more than everything else that --help imports
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    traceback: Annotated[bool, typer.Option(FULL, help="Show where an error comes from; goes with every command.")] = False,
) -> None:
    """A compiler for model surgery: named, checked rewrites of PyTorch models."""


@app.command()
def apply(
    model: ModelName,
    passes: Passes = None,
    pipeline: Pipeline = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            show_default=False,
            help="A .pt, .pt2, .onnx or .safetensors file, or a folder; by default model.pt becomes model.PASS.pt.",
        ),
    ] = None,
    inputs: Inputs = None,
    weights: Weights = None,
    data: Data = None,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything, but write no model.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write what happened as JSON.", show_default=False)
    ] = None,
    no_verify: NoVerify = False,
    trust_pickle: TrustPickle = False,
    heal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Samples to train the result on, by the model before."),
    ] = None,
    heal_steps: Annotated[int, typer.Option(metavar="N", min=0, help="Steps of healing.")] = 200,
    lr: Rate = 5e-4,
    loss: Loss = "auto",
    checkpoint: CheckpointFile = None,
) -> None:
    """Run passes over a model, prove what they promise, write the result."""
    from .curing import Cure
    from .job import Job, Model

    texts = _pass_texts(passes or [], pipeline)
    if not texts:
        raise RewriteError("no pass is given: add --pass NAME; rewrite passes lists them")
    source = Model(model, tuple(inputs or ()), weights, trust_pickle, seed)
    cure = None if heal is None else Cure(heal, None, heal_steps, lr, loss, checkpoint)
    _run(Job(source, texts, output, data, not no_verify, dry_run, report, cure=cure))


@app.command()
def heal(
    new: Annotated[str, typer.Argument(metavar="NEW", help="The rewritten model: as MODEL of apply.", show_default=False)],
    teacher: Annotated[str, typer.Option(metavar="OLD", help="The model that it was.", show_default=False)],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Samples to learn from.", show_default=False)],
    steps: Annotated[int, typer.Option(metavar="N", min=0, help="Steps of training.")] = 200,
    lr: Rate = 5e-4,
    loss: Loss = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", show_default=False, help="By default new.pt becomes new.heal.pt."),
    ] = None,
    inputs: Inputs = None,
    checkpoint: CheckpointFile = None,
    seed: Seed = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write what happened as JSON.", show_default=False)
    ] = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Train a rewritten model to give what the original gives: least squares first, then AdamW."""
    from .curing import Cure
    from .job import Job, Model

    given = tuple(inputs or ())
    models = [Model(spec, () if spec.endswith(".pt2") else given, None, trust_pickle, seed) for spec in (new, teacher)]
    cure = Cure(data, models[1], steps, lr, loss, checkpoint)
    _run(Job(models[0], (), output, report=report, cure=cure))


@app.command()
def passes(
    name: Annotated[
        str, typer.Argument(help="A pass to tell about.", show_default=False, autocompletion=complete_pass)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the passes, or tell what one does, promises and takes."""
    import json

    from rewrite.pipeline.registry import description_of, pass_names

    found: Any = description_of(name) if name else [_described_or_refused(each) for each in pass_names()]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from .render import show_pass, show_passes

    (show_pass if name else show_passes)(_console(), found)


@app.command()
def show(
    model: ModelName, inputs: Inputs = None, weights: Weights = None, seed: Seed = 0, trust_pickle: TrustPickle = False
) -> None:
    """Show what passes see of a model, and what they cannot see into."""
    from .job import Model
    from .shown import show_program

    with _steps() as steps:
        source = Model(model, tuple(inputs or ()), weights, trust_pickle, seed)
        program, _ = source.read(steps)
    show_program(_console(), program, captured=not source.is_program)


@app.command()
def memory(
    model: ModelName,
    passes: Passes = None,
    pipeline: Pipeline = "",
    backend: Annotated[str, typer.Option(metavar="NAME", help="eager or inductor.")] = "eager",
    inputs: Inputs = None,
    weights: Weights = None,
    data: Data = None,
    seed: Seed = 0,
    trust_pickle: TrustPickle = False,
    baselines: Annotated[bool, typer.Option(help="Beside it checkpointing, torch.compile and its budget.")] = True,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, as .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the bytes that autograd keeps in training, before and after passes if given, and other ways beside it."""
    from .job import Model
    from .measured import measured, show_memory

    texts = _pass_texts(passes or [], pipeline)
    source = Model(model, tuple(inputs or ()), weights, trust_pickle, seed)
    with _steps() as steps:
        found = measured(source, texts, backend, data, steps, baselines=baselines)
    if picture is not None:
        from .memory_picture import draw_memory

        draw_memory(found, picture)
    _tell(found, as_json, show_memory)


@app.command()
def depth(
    model: ModelName,
    passes: Passes = None,
    pipeline: Pipeline = "",
    inputs: Inputs = None,
    weights: Weights = None,
    data: Data = None,
    seed: Seed = 0,
    trust_pickle: TrustPickle = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, as .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell on data how much each block and branch adds, and how one depends on another."""
    from .depths import deep, show_depth
    from .job import Model

    texts = _pass_texts(passes or [], pipeline)
    source = Model(model, tuple(inputs or ()), weights, trust_pickle, seed)
    if picture is not None:
        from .pictures import check_picture

        check_picture(picture)
    with _steps() as steps:
        found = deep(source, texts, data, steps)
    if picture is not None:
        from .depth_picture import draw_depth

        draw_depth(found, picture)
    _tell(found, as_json, show_depth)


@app.command()
def axes(
    model: ModelName,
    inputs: Inputs = None,
    weights: Weights = None,
    check: Annotated[
        bool, typer.Option("--check", help="Set each dimension to a prime of its own, and infer every shape anew.")
    ] = False,
    seed: Seed = 0,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Tell which axes of which tensors are one logical dimension, and which of them can change."""
    import json

    from .dimensions import analyzed, show_axes
    from .job import Model

    source = Model(model, tuple(inputs or ()), weights, trust_pickle, seed)
    with _steps() as steps:
        found, checked = analyzed(source, check, steps)
    if as_json:
        typer.echo(json.dumps({**found.to_json(), "checked": checked}, indent=2))
        return
    show_axes(_console(), found, checked)


@app.command()
def export(
    model: ModelName,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="An .onnx or .pt2 file.", show_default=False)
    ],
    passes: Passes = None,
    pipeline: Pipeline = "",
    inputs: Inputs = None,
    weights: Weights = None,
    seed: Seed = 0,
    no_verify: NoVerify = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Write a model for another runtime, after passes if given."""
    from .job import Job, Model

    if output.suffix not in (".onnx", ".pt2"):
        raise RewriteError(f"cannot export to {output}: give an .onnx or .pt2 file; rewrite apply writes the others")
    source = Model(model, tuple(inputs or ()), weights, trust_pickle, seed)
    _run(Job(source, _pass_texts(passes or [], pipeline), output, verify=not no_verify, always=True))


@app.command()
def verify(
    first: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP, show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="Another model, as A.", show_default=False)],
    promise: Annotated[str, typer.Option(metavar="KIND", help="same, forward (gradients left aside) or close.")] = "same",
    bound: Annotated[
        float | None, typer.Option(metavar="X", help="For close: the largest relative error of a part.", show_default=False)
    ] = None,
    inputs: Inputs = None,
    seed: Seed = 0,
    trust_pickle: TrustPickle = False,
) -> None:
    """Hold one model against another: exit code 1 if they differ."""
    from .job import Model, compared
    from .render import show_verification

    with _steps() as steps:
        models = [
            Model(spec, tuple(inputs or ()) if not spec.endswith(".pt2") else (), None, trust_pickle, seed)
            for spec in (first, second)
        ]
        found = compared(models[0], models[1], promise, bound, steps)
    show_verification(_console(), found)
    if not found.passed:
        raise typer.Exit(1)


def _pass_texts(passes: list[str], pipeline: str) -> tuple[str, ...]:
    """The texts of `--pass`, one element each, or that of `--pipeline`."""
    from rewrite.pipeline.text import parse

    if passes and pipeline:
        raise RewriteError("--pass and --pipeline are two ways to say the same: give one of them")
    for text in passes:
        if len(parse(text)) != 1:
            raise RewriteError(f"--pass takes one pass, not {text!r}: repeat it, or use --pipeline")
    return tuple(passes) or ((pipeline,) if pipeline else ())


def _run(job: "Job") -> None:
    with _steps() as steps:
        outcome = job.run(steps)
    from .render import show_outcome

    show_outcome(_console(), outcome)


def _tell(found: Mapping[str, Any], as_json: bool, show: Callable[..., None]) -> None:
    """What was measured before and after, as JSON or as ``show`` prints it."""
    if not as_json:
        show(_console(), found)
        return
    import json

    typer.echo(json.dumps({name: each.to_json() for name, each in found.items()}, indent=2))


def _described_or_refused(name: str) -> dict[str, Any]:
    from rewrite.pipeline.registry import description_of

    try:
        return description_of(name)
    except RewriteError as error:  # one broken package must not hide the others' passes
        return {"name": name, "error": str(error)}


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _steps() -> "Steps":
    from .progress import Steps

    return Steps(_console(stderr=True))


def main() -> None:
    """The program `rewrite`."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, about each other; ours are in the report
    try:
        app(prog_name="rewrite")
    finally:
        gc.freeze()  # what is left goes with the process: collecting it first takes longer than showing the help


if __name__ == "__main__":
    main()
