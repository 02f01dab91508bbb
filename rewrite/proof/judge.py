"""How far two outcomes are apart, and how far is too far: rounding as it is measured, nothing wider."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rewrite.graph.maps import ParameterMap
from rewrite.numerics.compare import FLOOR, TOLERANCE, relative_error

from .form import Outcome
from .setting import ITSELF

ULPS = 8.0
"""How many times what one ulp at the border does is still rounding."""
SLACK = 4.0
"""How many times the old form's rounding error, and how many ulps, the new form's may be in the own dtype."""
CEILING = 1e-6
"""What no rounding in float64 excuses."""


@dataclass(frozen=True)
class Gap:
    """How far the new form is from the old: relative errors of outputs, gradients and state, and what is worst.

    ``silent``: dropouts were run at rate 0, since both forms draw other sizes.
    """

    outputs: float = 0.0
    gradients: float = 0.0
    state: float = 0.0
    worst: str = ""
    problem: str = ""
    unrun: str = ""
    silent: bool = False

    @property
    def largest(self) -> float:
        return math.inf if self.problem else max(self.outputs, self.gradients, self.state)

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        parts = {"outputs": self.outputs, "gradients": self.gradients, "state": self.state}
        where = f" (worst at {self.worst})" if self.worst else ""
        return ", ".join(f"{name} {error:.1e}" for name, error in parts.items()) + where


def gap(old: Outcome, new: Outcome, *, gradients: bool = True) -> Gap:
    """The gap between two outcomes on the same values; ``gradients`` False leaves those aside."""
    problem = _problem(old, new)
    if problem:
        return Gap(problem=problem)
    outputs = max(map(relative_error, old.outputs, new.outputs), default=0.0)
    state = {name: _state_error(old.state[name], new.state[name]) for name in old.state.keys() & new.state.keys()}
    state |= {name: _followed_error(old, *pair) for name, pair in new.followed.items()}
    errors = _gradient_errors(old, new) if gradients else {}
    worst = max(errors, key=lambda name: errors[name], default="")
    state_error = max(state.values(), default=0.0)
    return Gap(outputs, errors.get(worst, 0.0), state_error, worst if errors.get(worst, 0.0) > outputs else "")


def _problem(old: Outcome, new: Outcome) -> str:
    """What cannot be put into a number: other shapes, other requires_grad, inputs written to, other draws."""
    if len(old.outputs) != len(new.outputs):
        return f"{len(new.outputs)} outputs instead of {len(old.outputs)}"
    for x, y in zip(old.outputs, new.outputs, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"an output {tuple(y.shape)} {y.dtype} instead of {tuple(x.shape)} {x.dtype}"
    if old.requires_grad != new.requires_grad:
        return (
            "an output requires grad where it did not" if any(new.requires_grad) else "an output requires no grad any more"
        )
    for x, y in zip(old.inputs, new.inputs, strict=True):
        if not torch.equal(x.nan_to_num(), y.nan_to_num()):
            return "an input is written to"
    if old.draws != new.draws:
        return f"{new.draws} random draws instead of {old.draws}"
    return ""


def resized_draws(old: Outcome, new: Outcome) -> bool:
    """Whether both forms draw by the same operators at the same rates, as often or as many numbers, but of other sizes:
    a resized or merged tensor meets a dropout, and the numbers fall elsewhere.
    """
    if old.drawn == new.drawn or {d[:2] for d in old.drawn} != {d[:2] for d in new.drawn}:
        return False
    return len(old.drawn) == len(new.drawn) or sum(d[2] for d in old.drawn) == sum(d[2] for d in new.drawn)


def _gradient_errors(old: Outcome, new: Outcome) -> dict[str, float]:
    """The error of each old gradient, relative to its size and to the scale of all; one that is gone counts as zero."""
    scale = max((float(g.abs().max()) for g in old.gradients.values() if g is not None and g.numel()), default=0.0)
    return {name: _gradient_error(g, new.gradients.get(name), scale) for name, g in old.gradients.items()}


def _gradient_error(a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> float:
    if a is None and b is None:
        return 0.0
    a = torch.zeros_like(b) if a is None and b is not None else a
    b = torch.zeros_like(a) if b is None and a is not None else b
    assert a is not None
    assert b is not None
    if a.shape != b.shape:
        return math.inf
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    own = float(a.abs().max())
    distance = float((a - b).abs().max())
    if not math.isfinite(distance):
        return relative_error(a, b)
    return distance / max(own, FLOOR * scale) if max(own, FLOOR * scale) else math.inf


def _state_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return 0.0 if a.shape == b.shape and torch.equal(a, b) else relative_error(a, b)


def _followed_error(old: Outcome, made: ParameterMap, value: torch.Tensor) -> float:
    """A buffer that follows from old ones has to do so after the run too: relative to its size, or to a share of the largest
    buffer's, since a mean that is 0 but for rounding is rounded by each form in its own way. Entries that no old one flows
    into, beside others, are new channels' own: their statistics are promised nothing.
    """
    if not all(name in old.state for name in made.names):
        return 0.0
    expected = made.evaluate(old.state.__getitem__).double()
    flows = made.evaluate(lambda name: _another(old.state[name])).double() != expected
    flows = flows if flows.any() else torch.ones_like(flows)
    distance, own = float((expected - value.double())[flows].norm()), float(expected[flows].norm())
    scale = max((float(t.double().norm()) for t in old.state.values() if t.is_floating_point()), default=0.0)
    return distance / max(own, FLOOR * scale) if distance else 0.0


def _another(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor none of whose entries is as it was."""
    return ~tensor if tensor.dtype is torch.bool else tensor + tensor.abs().clamp(min=1)


def excess(truth: Outcome, old: Outcome, new: Outcome, own: Outcome, eps: float) -> Gap:
    """The new form's error against the truth where it is more than SLACK times the old one's and SLACK ulps; else none.

    A gradient that is a sum over n positions may be off by √n / 4 times as many ulps: rounding adds up like a random walk.
    Parameters that follow from old ones have gradients of their own, whose truth is in ``own``, the new form run exactly:
    their errors are held against those of all old gradients, the others against the old errors of the same ones. Parameters
    that follow from none (a router's) are promised nothing, here as in exact arithmetic: their gradient may be 0 but for the
    rounding of what cancels in it.
    Where an ulp of an output is below the least normal number of float32, what it was made of had fewer digits than its
    dtype has, and no error counts: exact arithmetic has judged there.
    """
    least = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
    outputs, theirs = (
        max((relative_error(a, b.to(a.dtype), least) for a, b in zip(truth.outputs, run.outputs, strict=True)), default=0.0)
        for run in (new, old)
    )
    found = Gap(outputs if outputs > SLACK * theirs + SLACK * eps else 0.0)
    positions = max((t.numel() for t in (*truth.inputs, *truth.outputs)), default=1)
    kept = {name: g for name, g in truth.gradients.items() if name not in new.sources}
    apart = {name: g for name, g in own.gradients.items() if name.endswith(ITSELF)}
    too_far = [0.0]
    for exact, old_ones in ((kept, kept), (apart, truth.gradients)):
        rest = max(_relative(old_ones, old.gradients).values(), default=0.0)
        for name, error in _relative(exact, new.gradients).items():
            if error > SLACK * rest + SLACK * eps * _walk(positions, exact[name]):
                too_far.append(error)
    return replace(found, gradients=max(too_far))


def _relative(truth: Mapping[str, torch.Tensor | None], got: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """How far each gradient is from the truth, relative to the scale of all; nothing where all are 0."""
    scale = max((float(g.abs().max()) for g in truth.values() if g is not None and g.numel()), default=0.0)
    return {name: _distance(g, got.get(name)) / scale for name, g in truth.items()} if scale else {}


def _walk(positions: int, gradient: torch.Tensor | None) -> float:
    """How many times more the rounding of a sum over so many positions is than that of one of them."""
    count = 1 if gradient is None or not gradient.numel() else positions / gradient.numel()
    return max(1.0, math.sqrt(count) / 4)


def _distance(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    present = a if a is not None else b
    if present is None or not present.numel():
        return 0.0
    gap_ = present.double() if a is None or b is None else a.double() - b.double()
    return float(gap_.nan_to_num().abs().max())


def tolerance(noise: Sequence[Gap]) -> float:
    """The largest error that is still rounding, given what one ulp at the border does to the old form."""
    return min(CEILING, max([TOLERANCE, *(ULPS * g.largest for g in noise)]))
