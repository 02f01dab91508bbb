"""What holding the parts of a program gave: each part with its trials, all together as checks of a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewrite.graph.history import Check
from rewrite.numerics.compare import TOLERANCE

from .cuts import Cut
from .hold import Forms, Trial
from .judge import Gap


@dataclass(frozen=True)
class Held:
    """One part: what it was tried on, the largest error, and the first failure, if any: where, and what.

    ``unrun``: inputs that the program itself does not run on. ``silent``: dropouts of other sizes were run at rate 0.
    """

    cut: Cut
    recorded: tuple[str, ...]
    probes: int
    worst: float
    failure: tuple[str, Gap] | None = None
    silent: bool = False
    unrun: tuple[str, ...] = ()


def hold(forms: Forms, trials: Iterable[Trial]) -> Held:
    """Try a part until it fails or all trials are through."""
    worst, silent, failure = 0.0, False, None
    recorded: list[str] = []
    unrun: list[str] = []
    probes = 0
    for trial in trials:
        if trial.values is None:
            unrun.append(trial.name)
            continue
        found = forms.tried(trial, trial.values)
        if trial.recorded:
            recorded.append(trial.name)
        else:
            probes += 1
        silent = silent or found.silent
        worst = max(worst, found.largest)
        if found.largest > TOLERANCE:
            failure = (trial.name, found)
            break
    return Held(forms.cut, tuple(recorded), probes, worst, failure, silent, tuple(unrun))


def summed(name: str, parts: Iterable[Held], what: str) -> Check:
    """One check over all parts: how many, tried on what, the largest error, and what was not held; or the first failure."""
    all_held: list[Held] = []
    for held in parts:
        if held.failure is not None:
            trial, found = held.failure
            return Check(name, False, f"{held.cut.name or 'the graph'}, on {trial}: {found}", found.largest)
        all_held.append(held)
    worst = max((held.worst for held in all_held), default=0.0)
    inputs = dict.fromkeys(name for held in all_held for name in held.recorded)
    probes = max((held.probes for held in all_held), default=0)
    words = f"{what}: {len(all_held)} parts, {worst:.1e}"
    words += f"; on {', '.join(inputs)}" * bool(inputs) + f", {probes} probes" * bool(probes)
    missing = dict.fromkeys(name for held in all_held for name in held.unrun)
    words += f"; not on {', '.join(missing)}, where the model does not run" * bool(missing)
    words += "; dropouts of other sizes at rate 0" * any(held.silent for held in all_held)
    return Check(name, True, words, worst)
