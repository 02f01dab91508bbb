"""Gradients that a pass estimates: against the method's own formula, and against the true gradient within a bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rewrite.graph.history import Check
from rewrite.numerics.compare import TOLERANCE

from .contract import NoFormulaError
from .cuts import Cut
from .form import Form, Outcome
from .layerwise import LayerwiseForm
from .part import Part
from .record import Tape
from .setting import Setting, projection
from .tensors import TensorsOf, World
from .variants import EXAMPLE

if TYPE_CHECKING:
    from .contract import Promising
    from .promises import Rewritten

DRAWS = 64
"""How many draws of a random gradient are averaged."""
SIGMAS = 6.0
"""How many standard errors the mean of a random gradient may be from the formula at one element."""
OVERALL = 2.0
"""How many it may be in root mean square over all elements, where one is expected."""


@dataclass(frozen=True)
class Quality:
    """An estimated gradient against the formula, and against the true one: relative error (root mean square over elements
    and draws) and cosine (mean over draws).
    """

    formula: float
    error: float
    cosine: float
    where: str


def gradient_held(
    cuts: Sequence[Cut], worlds: tuple[World, World], tape: Tape, rewritten: Rewritten, label: str
) -> Iterator[Check]:
    """Two checks: each part's gradient is the formula's, and it is near enough to the true one."""
    step, contract = rewritten.step, rewritten.contract
    if step is None:
        yield Check(f"gradient formula{label}", False, "no pass says what the gradient should be")
        return
    try:
        found = [_quality(cut, worlds, tape, step, rewritten.seed) for cut in cuts]
    except NoFormulaError as missing:
        yield Check(f"gradient formula{label}", False, str(missing))
        return
    worst = max(found, key=lambda q: q.formula, default=Quality(0, 0, 1, ""))
    detail = f"{len(found)} parts, {worst.formula:.1e}" + f" at {worst.where}" * (worst.formula > TOLERANCE)
    yield Check(f"gradient formula{label}", worst.formula <= TOLERANCE, detail, worst.formula)
    error = max((q.error for q in found), default=0.0)
    cosine = min((q.cosine for q in found), default=1.0)
    near = error <= contract.error_bound and cosine >= contract.cosine_bound
    bounds = f"bounds {contract.error_bound:g} and {contract.cosine_bound:g}"
    coarse = max(found, key=lambda q: q.error, default=Quality(0, 0, 1, "")).where if not near else ""
    bounds += f"; coarsest at {coarse}: leave it out by where='!{coarse}', or keep more" * bool(coarse)
    yield Check(
        f"gradient{label}", near, f"relative error {error:.3g}, cosine {cosine:.4f} to the true one; {bounds}", error
    )


def _quality(cut: Cut, worlds: tuple[World, World], tape: Tape, step: Promising, seed: int) -> Quality:
    values = tape.values(cut.old_border, EXAMPLE, training=False)
    assert values is not None
    setting = Setting(seed=seed)
    truth = Form.of(worlds[0], cut.old, cut.old_border, cut.outputs, side=0).run(values, setting)
    form = Form.of(worlds[1], cut.new, cut.new_border, cut.outputs)
    first = form.run(values, setting)
    runs = [first] if not first.draws else [form.run(values, replace(setting, draw=k)) for k in range(DRAWS)]
    wanted = _by_formula(cut, worlds, step, values, setting, first)
    got, spread = _mean(runs)
    true = torch.cat([_flat(truth.gradients.get(name), got[name]) for name in got] or [torch.zeros(0)])
    each = [nearness(true, torch.cat([_flat(one, one) for one in _one(run, got)] or [torch.zeros(0)])) for run in runs]
    error = math.sqrt(sum(error**2 for error, _ in each) / len(each))
    cosine = sum(cosine for _, cosine in each) / len(each)
    return Quality(_formula_error(got, wanted, spread, len(runs)), error, cosine, cut.name)


def _by_formula(
    cut: Cut, worlds: tuple[World, World], step: Promising, values: Sequence[torch.Tensor], setting: Setting, ran: Outcome
) -> Mapping[str, torch.Tensor]:
    """What the pass says the gradients are, by the names that a form gives them."""
    if LayerwiseForm.fits(worlds, cut):
        made = LayerwiseForm(worlds, cut, step).run(values, setting).gradients
        return {name: gradient for name, gradient in made.items() if gradient is not None}
    new = TensorsOf(worlds[1], cut.new, setting)
    old = TensorsOf(worlds[0], cut.old, setting, leaves=new.leaves)
    part = Part(old.called(cut.old), new.called(cut.new))
    wide = [v.double() if v.is_floating_point() else v for v in values]
    found: Any = step.gradient(part, wide, [projection(o, setting.seed + i) for i, o in enumerate(ran.outputs)])
    inputs, parameters = found if isinstance(found, tuple) and isinstance(found[-1], Mapping) else (found, {})
    named = {f"border {i}": g for i, g in enumerate(inputs) if g is not None}
    return {**named, **parameters}


def _mean(runs: Sequence[Outcome]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The mean and the deviation of each gradient over runs."""
    names = [name for name, g in runs[0].gradients.items() if g is not None]
    stacks = {name: torch.stack([_present(run, name) for run in runs]) for name in names}
    return {n: s.mean(0) for n, s in stacks.items()}, {n: s.std(0, unbiased=False) for n, s in stacks.items()}


def _present(run: Outcome, name: str) -> torch.Tensor:
    found = run.gradients[name]
    assert found is not None
    return found


def _one(run: Outcome, names: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for name in names:
        yield _present(run, name)


def _formula_error(
    got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], spread: Mapping[str, torch.Tensor], runs: int
) -> float:
    """The largest relative distance from the formula beyond what the spread of the draws explains."""
    if set(wanted) - set(got):
        return math.inf
    scale = max((float(g.abs().max()) for g in got.values() if g.numel()), default=0.0)
    errors = [0.0]
    for name, gradient in got.items():
        if not bool(gradient.isfinite().all()):
            return math.inf
        target = wanted.get(name, torch.zeros_like(gradient))
        errors.append(_beyond(gradient - target, spread[name] / math.sqrt(runs)) / scale if scale else 0.0)
    return max(errors)


def _beyond(distance: torch.Tensor, deviation: torch.Tensor) -> float:
    """What of a distance the standard error of a mean does not explain, at any element and over all of them.

    An element that the draws happened to round alike shows no spread: the spread over all stands in for it.
    """
    typical = float(deviation.square().mean().sqrt())
    single = float((distance.abs() - SIGMAS * deviation.clamp(min=typical)).max())
    every = float(distance.square().mean().sqrt()) - OVERALL * typical
    return max(single, every, 0.0)


def nearness(true: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """Relative error (root mean square) and cosine."""
    size, mine = float(true.norm()), float(got.norm())
    if not size or not mine:
        return (0.0, 1.0) if size == mine else (math.inf, 0.0)
    return float((true - got).norm()) / size, float(true @ got) / (size * mine)


def _flat(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return (torch.zeros_like(like) if gradient is None else gradient).reshape(-1).double()
