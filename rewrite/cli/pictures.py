"""Pictures of what was measured: the figure, and the file that it goes to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.errors import RewriteError
from rewrite.files.staging import Staging, explained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(file: Path) -> None:
    """Raises RewriteError for another kind of file, and where matplotlib is not installed."""
    if file.suffix not in SUFFIXES:
        raise RewriteError(f"a picture is written as {', '.join(SUFFIXES)}, not as {file.name}")
    _figures()


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches. Raises RewriteError where matplotlib is not installed."""
    made: Figure = _figures()(figsize=(width, height), layout="constrained")
    return made


def write_picture(figure: Figure, file: Path) -> None:
    """Write a figure to a file, whole or not at all."""
    check_picture(file)
    with Staging() as staging, explained(file):
        figure.savefig(staging.path(file), dpi=110)


def _figures() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RewriteError("pictures need matplotlib: pip install matplotlib") from None
    return Figure
