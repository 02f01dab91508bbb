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
    """One part, how often it was tried, the largest error, and the first failure, if any: in which trial, and what."""

    cut: Cut
    trials: int
    worst: float
    failure: tuple[str, Gap] | None = None
    silent: bool = False


def hold(forms: Forms, trials: Iterable[Trial]) -> Held:
    """Try a part until it fails or all trials are through."""
    worst, count, silent = 0.0, 0, False
    for trial in trials:
        found = forms.tried(trial)
        count += 1
        silent = silent or found.silent
        if found.largest > TOLERANCE:
            return Held(forms.cut, count, found.largest, (trial.name, found))
        worst = max(worst, found.largest)
    return Held(forms.cut, count, worst, silent=silent)


def summed(name: str, parts: Iterable[Held], what: str) -> Check:
    """One check over all parts: how many, on how many trials, the largest error; the first failure if there is one."""
    count, tried, worst, silent = 0, 0, 0.0, False
    for held in parts:
        count, tried, worst = count + 1, tried + held.trials, max(worst, held.worst)
        silent = silent or held.silent
        if held.failure is not None:
            trial, found = held.failure
            return Check(name, False, f"{held.cut.name or 'the graph'}, on {trial}: {found}", found.largest)
    aside = ", dropouts of other sizes at rate 0" if silent else ""
    return Check(name, True, f"{what}: {count} parts in {tried} trials, {worst:.1e}{aside}", worst)
