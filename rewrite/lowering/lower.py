"""From a program to something that runs elsewhere, by whichever backend is installed under a name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewrite.errors import RewriteError, did_you_mean
from rewrite.graph.program import Program
from rewrite.plugins import BACKENDS, find, installed, load, provider


def lower(program: Program, backend: str = "eager", **options: Any) -> Callable[..., Any]:
    """A callable with the model's signature that runs a copy of ``program`` for inference.

    ``backend`` is the name of an installed backend (``eager``, ``inductor``, ``onnxruntime``, or a third party's),
    ``options`` are its own. Raises RewriteError for an unknown backend or option, and where the program cannot be
    lowered.
    """
    lowered: Callable[..., Any] = _called(backend, program, **options)
    return lowered


def export_onnx(program: Program, path: str | Path, **options: Any) -> Path:
    """Write ``program`` for inference as an ONNX file and return its path; ``options`` as in ``rewrite.backends.onnx``.

    The file appears only once it has been checked. Raises RewriteError where the program cannot be expressed in ONNX
    or the file does not compute the same.
    """
    return Path(_called("onnx", program, path, **options))


def _called(backend: str, program: Program, *args: Any, **options: Any) -> Any:
    if not isinstance(program, Program):
        raise RewriteError(f"lowering takes a Program, not a {type(program).__name__}: rewrite.capture makes one")
    function = get_backend(backend)
    parameters = inspect.signature(function).parameters
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    try:
        inspect.signature(function).bind(program, *args, **options)
    except TypeError as error:
        wrong = next((name for name in options if name not in parameters), "")
        hint = did_you_mean(wrong, known) if wrong else ""
        raise RewriteError(f"backend '{backend}': {error}{hint}; its options: {', '.join(known) or 'none'}") from None
    return function(program, *args, **options)


def backend_names() -> tuple[str, ...]:
    """The names of all installed backends, sorted; raises as `pass_names` does."""
    return tuple(installed(BACKENDS))


def get_backend(name: str) -> Callable[..., Any]:
    """The lowering function of the backend with this name.

    Raises `RewriteError` for an unknown name, naming the nearest, and for an entry point that cannot be
    imported or called.
    """
    entry_point = find(BACKENDS, "backend", name)
    found = load(entry_point, "backend")
    if not callable(found):
        raise RewriteError(f"backend '{name}' from {provider(entry_point)} is refused: it is no function")
    lowering: Callable[..., Any] = found
    return lowering
