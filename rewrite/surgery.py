"""The whole way in one call: a model in, the same class with the passes in it out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rewrite.errors import RewriteError
from rewrite.graph.history import Record
from rewrite.graph.program import LayerGraph
from rewrite.lowering.graft import graft
from rewrite.pipeline.run import PassSpec, apply
from rewrite.sources.inputs import infer_inputs


def transform(
    model: nn.Module,
    passes: PassSpec,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    verify: bool = True,
    data: Any = None,
    crash_folder: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A copy of ``model``, of its own class, with passes applied: captured, rewritten, proven and grafted.

    ``passes`` is pipeline text, a pass, or a list of both. ``args`` and ``kwargs`` are example inputs (a batch of 2 or
    more); without any they are inferred where the model tells them, as timm's and transformers' models do. ``data`` is
    for passes that look at samples. Unless ``verify`` is False, each pass is proven against its contract, and the copy
    is compared with what was proven, in both modes. The model is not changed.

    What a pass warns of, and that a pass changed nothing, is a Python warning.

    Raises RewriteError for bad text or options, for a model that cannot be captured, and, with the reason and the way
    out, where the result cannot be put into the model's class; VerificationError when a pass breaks its word.
    """
    if isinstance(model, LayerGraph) or not isinstance(model, nn.Module):
        raise RewriteError(f"transform takes your own nn.Module, not a {_kind(model)}: rewrite.apply takes a Program")
    if args is None and kwargs is None:
        args, kwargs = _inferred(model, seed)
    program = apply(model, passes, args, kwargs, seed=seed, verify=verify, share=True, data=data, crash_folder=crash_folder)
    for record in program.history:
        for message in _doubts(record):
            warnings.warn(message, stacklevel=2)
    try:
        return graft(program, model, verify=verify)
    except RewriteError as error:
        raise RewriteError(
            f"{error} (the passes themselves {'hold' if verify else 'ran'}: "
            "rewrite.apply, with the same arguments, gives the program, to be trained, saved and lowered)"
        ) from error


def _kind(model: object) -> str:
    return "program's module" if isinstance(model, LayerGraph) else type(model).__name__


def _inferred(model: nn.Module, seed: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
    try:
        return infer_inputs(model, seed=seed)
    except RewriteError as error:
        raise RewriteError(f"{error}; in Python: args=(x,), kwargs={{...}}") from error


def _doubts(record: Record) -> list[str]:
    reasons = "".join(f"; {skip.path}: {skip.reason}" if skip.path else f": {skip.reason}" for skip in record.skipped[:3])
    return [*record.warnings, *([] if record.changed else [f"pass {record.text} changed nothing{reasons}"])]
