"""The proof of a pass: what its contract promises, checked on the programs before and after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rewrite.graph.edit import Change
from rewrite.graph.history import Check, Verification
from rewrite.graph.program import Program
from rewrite.numerics.probes import fresh_inputs, perturbed

from .contract import CLOSE, NEW, SAME, Promising
from .figures import reported
from .formula import formula_checks
from .kept import structure
from .same import same_checks
from .undo import undo_checks

Rerun = Callable[..., tuple[Program, Any]]


def prove(
    before: Program,
    after: Program,
    changes: Sequence[Change],
    step: Promising,
    seed: int,
    *,
    data: Any,
    rerun: Rerun,
    changed: bool = True,
) -> Verification:
    """Check everything that ``step`` promises for ``before -> after``; nothing of either is changed.

    ``changed`` is whether the two differ at all: a difference that no edit accounts for is a failure.
    """
    began = time.perf_counter()
    contract = step.contract()
    checks = list(structure(before, after, changes))
    if changed and not changes:
        checks.append(Check("journal", False, "the program changed without an edit"))
    if not all(check.passed for check in checks):
        return Verification(tuple(checks), time.perf_counter() - began, seed)
    if any(t.is_meta for t in [*before.module.parameters(), *before.module.buffers()]):
        checks.append(Check("values", True, "not checked: the tensors are on the meta device"))
        return Verification(tuple(checks), time.perf_counter() - began, seed)
    if changes:
        probe = perturbed(before, seed)
        rewritten, context = rerun(probe, step, seed=seed, data=data)
        args, kwargs = fresh_inputs(before.example_args, before.example_kwargs, seed)
        if contract.forward is SAME and contract.backward is SAME:
            checks += same_checks(probe, rewritten, args, kwargs, seed)
        if contract.forward in (CLOSE, NEW):
            checks += undo_checks(probe, rewritten, context.edit.changes, args, kwargs, seed)
            checks += formula_checks(rewritten, context.edit.changes, step, args, kwargs, seed)
            checks += reported(before, after, changes, seed)
    return Verification(tuple(checks), time.perf_counter() - began, seed)
