"""Why a model was not captured: the line of its code where a trace stopped, and what a trace must not hold."""

from __future__ import annotations

import itertools
import linecache
import sys
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch.fx import GraphModule

from rewrite.errors import RewriteError, named_line

from .vmaps import transform_step

_OURS = (Path(torch.__file__).parent, Path(__file__).parents[1])


def why(error: BaseException) -> str:
    """An error's first line, and the line of the model's code that it came from."""
    return str(error) if isinstance(error, RewriteError) else named_line(error) + _model_line(error)


def _model_line(error: BaseException) -> str:
    """`` (at FILE:LINE: CODE)``: the innermost line outside of torch and of this package where an error came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_the_models(f.filename)]
    if not frames:
        return ""
    found = frames[-1]
    return f" (at {_short(found.filename)}:{found.lineno}: {(found.line or '').strip()})"


def model_line_of(frame: FrameType | None) -> tuple[str, str]:
    """``FILE:LINE`` and the code there: of a running frame and its callers, the innermost one of the model's code."""
    while frame is not None and not _is_the_models(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "an unknown line", ""
    file = frame.f_code.co_filename
    return f"{_short(file)}:{frame.f_lineno}", linecache.getline(file, frame.f_lineno).strip()


def _is_the_models(file: str) -> bool:
    path = Path(file)
    standard = path.is_relative_to(sys.base_prefix) and "site-packages" not in path.parts
    return path.is_file() and not standard and not any(path.is_relative_to(folder) for folder in _OURS)


def _short(file: str) -> str:
    """A path as an import would start it."""
    path = Path(file)
    roots = [Path(root) for root in sys.path if root and path.is_relative_to(root)]
    return str(path.relative_to(max(roots, key=lambda root: len(root.parts)))) if roots else file


def refuse_transforms(module: GraphModule) -> None:
    """Refuse a trace that holds the inner steps of a function transform: run as operators, they raise.

    Raises RewriteError with the line of the model's code that calls it.
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            if step := transform_step(node):
                raise RewriteError(
                    f"its code uses a transform of functions (torch.func), whose own step {step} would stand in the graph"
                    f"{_written_at(node.meta.get('stack_trace'))}"
                )


def _written_at(stack: str | None) -> str:
    """As ``_model_line``, from the trace of lines that a node carries."""
    lines = [line.strip() for line in (stack or "").splitlines()]
    places = [(line, code) for line, code in itertools.pairwise(lines) if line.startswith("File ")]
    if not places:
        return ""
    (_, file, rest), code = places[-1][0].split('"', 2), places[-1][1]
    return f" (at {_short(file)}:{rest.split(',')[1].replace('line', '').strip()}: {code})"
