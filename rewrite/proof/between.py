"""Two programs that no pass connects, held to a promise."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rewrite.errors import RewriteError
from rewrite.graph.history import Check, Verification
from rewrite.graph.program import Program
from rewrite.graph.tree import on_meta

from .contract import CLOSE, NEW, SAME, Contract
from .kept import outputs_and_signature
from .promises import Parts, Rewritten, close, same


def prove(before: Program, after: Program, *, contract: Contract | None = None, seed: int = 0) -> Verification:
    """Hold ``after`` to what a contract promises of ``before``, part by part where their graphs agree elsewhere.

    SAME in both directions by default: outputs, state and the gradients of all parameters in both modes, to a relative error
    of 1e-10 in exact arithmetic; with backward NEW outputs and state alone. CLOSE: every part that differs within
    ``contract.bound`` of its old form at the values that flow into it (relative, root mean square). Nothing is changed.

    Raises RewriteError for a promise that only a pass can be held to (NEW, ESTIMATE), and on the meta device.
    """
    contract = contract or Contract(SAME, SAME)
    if contract.forward not in (SAME, CLOSE) or contract.backward not in (SAME, NEW):
        raise RewriteError(
            f"two programs can be held to SAME or CLOSE; {contract} is a promise that a pass's formula decides"
        )
    if on_meta(before.module) or on_meta(after.module):
        raise RewriteError("nothing can be proven on the meta device: move the model to a real one")
    began = time.perf_counter()
    checks = list(outputs_and_signature(before, after))
    if all(check.passed for check in checks):
        checks += _promised(Rewritten(before, after, contract, seed=seed))
    return Verification(tuple(checks), time.perf_counter() - began, seed)


def _promised(rewritten: Rewritten) -> Iterator[Check]:
    yield same(rewritten) if rewritten.contract.forward is SAME else close(Parts(rewritten))
