"""An inserted layer against the formula that its pass gives for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.graph.edit import Change
from rewrite.graph.history import Check
from rewrite.graph.program import Program
from rewrite.numerics.compare import TOLERANCE, relative_error
from rewrite.numerics.exact import ExactArithmetic
from rewrite.numerics.probes import Watcher, watch

from .contract import Promising

Gradients = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class _Compared:
    """A layer and its formula on the same inputs: the error of the outputs, and the gradients of all variables."""

    error: float
    got: Gradients
    wanted: Gradients


def formula_error(step: Promising, change: Change, recorded: Sequence[torch.Tensor]) -> float:
    """The largest relative error of outputs and gradients in float64, on the recorded inputs and on normal ones.

    A gradient counts relative to the larger of the two: where a layer is saturated its gradient is rounding alone.
    """
    assert change.new is not None
    layer = copy.deepcopy(change.new).double().eval()
    generator = torch.Generator().manual_seed(0)
    real = [t.detach().double() if t.is_floating_point() else t for t in recorded]
    normal = [_normal(t, generator) if t.is_floating_point() else t for t in real]
    first, second = (_compared(step, change.old, layer, inputs, generator) for inputs in (real, normal))
    pairs = zip(zip(first.got, second.got, strict=True), zip(first.wanted, second.wanted, strict=True), strict=True)
    return max(first.error, second.error, *(_gradient_error(got, wanted) for got, wanted in pairs))


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _compared(
    step: Promising, old: nn.Module | None, layer: nn.Module, inputs: Sequence[torch.Tensor], generator: torch.Generator
) -> _Compared:
    variables = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    with ExactArithmetic():
        got = layer(*variables)
    wanted = step.reference(old, layer, *variables)
    weights = _normal(got, generator)
    sources = [t for t in [*variables, *layer.parameters()] if t.requires_grad]
    left, right = (torch.autograd.grad((value * weights).sum(), sources, allow_unused=True) for value in (got, wanted))
    return _Compared(relative_error(wanted, got), left, right)


def _gradient_error(got: Gradients, wanted: Gradients) -> float:
    """The relative error of one variable's gradients, those of both runs taken together."""
    if any((g is None) != (w is None) for g, w in zip(got, wanted, strict=True)):
        return math.inf
    return relative_error(_joined(wanted), _joined(got))


def _joined(gradients: Gradients) -> torch.Tensor:
    return torch.cat([g.reshape(-1) for g in gradients if g is not None] or [torch.zeros(0)])


def formula_checks(
    after: Program, changes: Sequence[Change], step: Promising, args: Any, kwargs: Any, seed: int
) -> Iterator[Check]:
    """Each inserted layer against the pass's own formula, on the input of each of its calls, in float64, gradient too."""
    errors: dict[str, float] = {}
    sites: dict[str, list[Change]] = {}
    for change in changes:
        if change.new is not None:
            sites.setdefault(change.path, []).append(change)

    def watcher(path: str) -> Watcher:
        def seen(inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            with torch.enable_grad():
                found = [formula_error(step, change, inputs) for change in sites[path]]
            errors[path] = max([errors.get(path, 0.0), *found], key=_badness)

        return seen

    watch(after, {path: watcher(path) for path in sites}, args, kwargs, seed)
    unseen = next((path for path in sites if path not in errors), None)
    if unseen is not None:
        yield Check("formula", False, f"{unseen} is never called, so nothing shows what it computes", math.inf)
        return
    worst = max(errors, key=lambda path: _badness(errors[path]))
    yield Check("formula", errors[worst] <= TOLERANCE, f"{len(errors)} layers, worst at {worst}", errors[worst])


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error
