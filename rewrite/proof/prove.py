"""The proof of a pass: what its contract promises, checked on the programs before and after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rewrite.graph.edit import Change
from rewrite.graph.history import Check, Verification
from rewrite.graph.program import Program
from rewrite.graph.tree import on_meta
from rewrite.numerics.probes import fresh_inputs, perturbed

from .contract import CLOSE, NEW, SAME, Promising
from .figures import reported
from .formula import formula_checks
from .frame import frame
from .kept import structure
from .same import same_checks


@dataclass(frozen=True)
class Claim:
    """What is to be proven: that ``step`` kept its word from ``before`` to ``after``, by the edits in ``changes``.

    ``rerun`` runs the pass on another program: the result, and its edits.
    """

    before: Program
    after: Program
    changes: Sequence[Change]
    step: Promising
    seed: int
    rerun: Callable[[Program], tuple[Program, Sequence[Change]]]


def prove(claim: Claim) -> Verification:
    """Check everything that the pass promises; nothing of either program is changed."""
    began = time.perf_counter()
    same = frame(claim.before, claim.after, claim.changes)
    checks = [*structure(claim.before, claim.after, claim.changes), same]
    if all(check.passed for check in checks):
        checks += _values(claim)
    return Verification(tuple(checks), time.perf_counter() - began, claim.seed)


def _values(claim: Claim) -> Iterator[Check]:
    """The checks that run something."""
    if on_meta(claim.before.module):
        yield Check("values", True, "not checked: the tensors are on the meta device")
        return
    if not claim.changes:
        return
    contract = claim.step.contract()
    probe = perturbed(claim.before, claim.seed)
    rewritten, changes = claim.rerun(probe)
    args, kwargs = fresh_inputs(claim.before.example_args, claim.before.example_kwargs, claim.seed)
    if contract.forward is SAME and contract.backward is SAME:
        yield from same_checks(probe, rewritten, args, kwargs, claim.seed)
    if contract.forward in (CLOSE, NEW):
        yield from _new(claim, probe, rewritten, changes)
        yield from formula_checks(rewritten, changes, claim.step, args, kwargs, claim.seed)
        yield from reported(claim.before, claim.after, claim.changes, claim.seed)


def _new(claim: Claim, probe: Program, rewritten: Program, changes: Sequence[Change]) -> Iterator[Check]:
    """Another function is proven where layers were replaced; nothing yet says what any other edit should compute."""
    unproven = next((c for c in (*claim.changes, *changes) if c.kind != "replace layer"), None)
    if unproven is not None:
        place = unproven.path or unproven.node
        yield Check(
            "edits", False, f"{unproven.kind} at {place}: only replaced layers can be proven to be what a formula says"
        )
    again = frame(probe, rewritten, changes)
    if not again.passed:
        yield again
