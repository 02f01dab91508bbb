"""The promise SAME: outputs, gradients and buffers equal in exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rewrite.graph.history import Check
from rewrite.graph.program import Program
from rewrite.numerics.compare import MODES, TOLERANCE, Difference, Mode, difference, run


def same_checks(before: Program, after: Program, args: Any, kwargs: Any, seed: int) -> Iterator[Check]:
    """Both in exact arithmetic, in both modes: outputs, gradients of kept parameters, buffers.

    Where nothing that ran in evaluation asked for the mode, training computes the same, and is not run.
    """
    note = ""
    for mode in MODES:
        if not note:
            gap, own = (difference_of(before, after, args, kwargs, mode, seed, exact=exact) for exact in (True, False))
        yield Check(
            f"same {mode}", gap.largest <= TOLERANCE, f"{words(gap)}; in the model's dtype {words(own)}{note}", gap.largest
        )
        note = "" if gap.modal or own.modal else "; as in evaluation: nothing depends on the mode"


def difference_of(
    before: Program, after: Program, args: Any, kwargs: Any, mode: Mode, seed: int, *, exact: bool
) -> Difference:
    try:
        left = run(before.module, args, kwargs, mode, exact=exact, seed=seed)
    except RuntimeError:  # its own backward fails: what it computes is still compared
        left = run(before.module, args, kwargs, mode, exact=exact, seed=seed, gradients=False)
        right = run(after.module, args, kwargs, mode, exact=exact, seed=seed, gradients=False)
        return replace(difference(left, right), note="gradients not compared: the input's own backward fails")
    return difference(left, run(after.module, args, kwargs, mode, exact=exact, seed=seed))


def words(gap: Difference) -> str:
    if gap.problem:
        return gap.problem
    figures = f"outputs {gap.outputs:.1e}, gradients {gap.gradients:.1e}, buffers {gap.buffers:.1e}"
    return f"{figures}; {gap.note}" if gap.note else figures
