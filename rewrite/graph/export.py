"""torch.export with what this package needs of it: inputs bound, sizes dynamic, noise held back."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from rewrite.errors import RewriteError, named_line
from rewrite.torch_private import pytree

from .codegen import keyword_safe


@dataclass(frozen=True)
class Inputs:
    """A model's example inputs in canonical order: positional as far as the signature allows, the rest by keyword."""

    signature: inspect.Signature
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def export_program(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Export a layer graph as it stands (mode, outputs), its dynamic sizes kept as far as torch.export can."""
    errors: list[Exception] = []
    for dynamic in dynamic_choices(inputs):
        try:
            with quiet(), keyword_safe():
                return torch.export.export(module, inputs.args, dict(inputs.kwargs), dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            errors.append(error)
    raise RewriteError(f"torch.export cannot export the program: {named_line(errors[-1])}") from errors[-1]


def widened(inputs: Inputs) -> Inputs:
    """The inputs with a batch of one doubled: a size of one would be baked into the graph."""
    tensors = [v for v in pytree.tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(v, torch.Tensor) and v.dim()]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return inputs

    def double(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() else value

    args, kwargs = pytree.tree_map(double, (inputs.args, dict(inputs.kwargs)))
    return Inputs(inputs.signature, args, kwargs)


def dynamic_choices(inputs: Inputs) -> Iterator[Any]:
    """Dynamic dimensions to try in turn: all that may vary, the first of each tensor, none."""
    structure = (inputs.args, dict(inputs.kwargs))
    tokens = any(isinstance(v, torch.Tensor) and not v.is_floating_point() for v in pytree.tree_leaves(structure))

    def widest(value: torch.Tensor) -> int:
        image = value.is_floating_point() and value.dim() >= 4 and not tokens
        return 1 if image else value.dim()

    for axes in (widest, lambda value: min(value.dim(), 1)):
        shapes = torch.export.ShapesCollection()
        for leaf in pytree.tree_leaves(structure):
            if isinstance(leaf, torch.Tensor):
                shapes[leaf] = dict.fromkeys(range(axes(leaf)), Dim.AUTO)
        yield shapes
    yield None


def without_lines(off: bool = True) -> AbstractContextManager[Any]:
    """Traces whose nodes do not say which lines of code made them: to find these takes a tenth to a fifth of the time."""
    return mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", off, create=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export warns and logs about what capture handles; errors still come through as exceptions."""
    previous = logging.root.manager.disable
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(previous)
