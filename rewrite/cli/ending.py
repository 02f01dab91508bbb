"""How a run ends that did not succeed: one line on stderr, and the exit code.

2 is for what the user can mend, 1 for a bug of ours, 130 for an interrupt; a reader of our output that went away is
left to the caller.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from rewrite.errors import PipelineError, RewriteError, first_line, named_line, one_lined, printable

BUG, MISTAKE, INTERRUPTED = 1, 2, 130
LONGEST = 1000
"""How many characters a line of an error may have: names from files can be of any length."""
UsageError: Any = typer.BadParameter.__bases__[0]  # of click, or of the copy of it that newer versions of typer carry
_HELP: Any = (typer.Exit, typer.Abort, SystemExit, BrokenPipeError)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


@contextmanager
def one_line(*, full: bool = False) -> Iterator[None]:
    """Turn whatever goes wrong into one line and `typer.Exit` with its code; ``full`` shows the traceback before it."""
    try:
        yield
    except _HELP:
        raise
    except UsageError as error:
        _say(_usage(error))
        raise typer.Exit(MISTAKE) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing is written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if full:
            traceback.print_exception(error)
        line, code = told(error)
        _say(line)
        raise typer.Exit(code) from None


def told(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, PipelineError):
        return str(error), MISTAKE  # shows the text, with a caret below it
    if isinstance(error, RewriteError):
        return one_lined(str(error)), MISTAKE
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return f"there is not enough memory for this: {first_line(error)}; use smaller inputs or a smaller model", MISTAKE
    if isinstance(error, RecursionError):
        return "the model, or a text, is nested too deeply for Python to follow (--traceback shows where)", MISTAKE
    if isinstance(error, OSError) and error.strerror:
        return one_lined(f"{error.strerror}{f': {error.filename}' if error.filename else ''}"), MISTAKE
    return f"this is a bug of rewrite: {named_line(error)} ({_place(error)}); run again with --traceback, and report it", BUG


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"


def _usage(error: Any) -> str:
    command = error.ctx.command_path if error.ctx is not None else "rewrite"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help"


def _say(message: str) -> None:
    lines = [line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..." for line in printable(message).split("\n")]
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo("\n".join(lines), err=True)
