"""The proof of a pass: what its contract promises, checked on the programs before and after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rewrite.graph.change import Change
from rewrite.graph.history import Check, Verification
from rewrite.graph.program import Program
from rewrite.graph.relation import moved
from rewrite.graph.renumber import renumbered
from rewrite.graph.tree import on_meta
from rewrite.numerics.probes import perturbed

from .contract import CLOSE, NEW, Promising
from .frame import differs, frame
from .kept import structure
from .promises import Parts, Rewritten, kept_promises, reported
from .properties import properties_held
from .trains import trains


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


def proof_of(claim: Claim) -> Verification:
    """Check everything that the pass promises; nothing of either program is changed."""
    began = time.perf_counter()
    names = dict(pair for change in claim.changes for pair in change.names)
    before = renumbered(claim.before, names)
    same = frame(before, claim.after, claim.changes)
    checks = [*structure(before, claim.after, claim.changes), same]
    if all(check.passed for check in checks):
        checks += _values(claim, before, names)
    return Verification(tuple(checks), time.perf_counter() - began, claim.seed)


def _values(claim: Claim, before: Program, names: Mapping[str, str]) -> Iterator[Check]:
    """The checks that run something; ``before`` is the program before with modules numbered as they are after."""
    if on_meta(claim.before.module):
        yield Check("values", True, "not checked: the tensors are on the meta device")
        return
    if not claim.changes:
        return
    contract = claim.step.contract()
    yield _deterministic(claim)
    parts = Parts(_rewritten(claim, before, claim.after, claim.changes))
    first = list(kept_promises(parts))
    figures = list(reported(parts)) if contract.forward in (CLOSE, NEW) else []
    yield from first
    yield from trains(before, claim.after, contract, claim.seed)
    yield from properties_held(before, claim.after, contract, claim.seed)
    if all(check.passed for check in first):
        probe = perturbed(claim.before, claim.seed)
        after, changes = claim.rerun(probe)
        again = Parts(_rewritten(claim, renumbered(probe, names), after, changes, probed=False), parts)
        yield from kept_promises(again, " with other weights")
    yield from figures


def _rewritten(
    claim: Claim, before: Program, after: Program, changes: Sequence[Change], *, probed: bool = True
) -> Rewritten:
    maps = {c.path: c.map for c in changes if c.map is not None}
    relations = moved((c.nodes, c.relations) for c in changes if c.kind == "move")
    return Rewritten(before, after, claim.step.contract(), maps, claim.step, claim.seed, probed, relations)


def _deterministic(claim: Claim) -> Check:
    """Whether the pass gives the same graph, layers and tensors when it is run again."""
    again, _ = claim.rerun(claim.before)
    found = differs(claim.after, again)
    return Check("deterministic", not found, "" if not found else "another run of the pass gave another program")
