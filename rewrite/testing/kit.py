"""Every check of a pass, in order: the cheap and telling ones first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from rewrite.errors import RewriteError
from rewrite.graph.program import Program
from rewrite.pipeline.crash import VerificationError
from rewrite.pipeline.pass_ import Pass
from rewrite.pipeline.registry import as_passes

from .effects import (
    check_changes,
    check_deterministic,
    check_elsewhere,
    check_near_miss,
    check_partial,
    check_proof,
    check_twice,
    check_untouched,
)
from .forms import check_bfloat16, check_copied, check_fresh, check_meta, check_saved, check_trained
from .fresh import FreshProcess
from .lowered import check_captured_again, check_grafted, check_lowered
from .subject import Subject
from .texts import check_described, check_text
from .trial import Expected, PassCheckError, Trial, fail

Check = Callable[[Trial], str]

CHECKS: Mapping[str, Check] = {
    "described": check_described,
    "text": check_text,
    "deterministic": check_deterministic,
    "untouched": check_untouched,
    "changes": check_changes,
    "near miss": check_near_miss,
    "elsewhere": check_elsewhere,
    "partial": check_partial,
    "proof": check_proof,
    "twice": check_twice,
    "copied": check_copied,
    "saved": check_saved,
    "fresh": check_fresh,
    "trained": check_trained,
    "bfloat16": check_bfloat16,
    "meta": check_meta,
    "grafted": check_grafted,
    "captured again": check_captured_again,
    "lowered": check_lowered,
}
"""Every check by its name, in the order in which ``check_pass`` makes them."""
OF_RESULTS = ("copied", "saved", "fresh", "trained", "grafted", "captured again", "lowered")
"""Checks of what a result can do. Where nothing changed, which ``changes`` has seen, it is what the program can."""


def check_pass(
    step: Pass | str,
    model: nn.Module | Program | Subject,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    changes: Expected,
    near_miss: Mapping[str, str] | None = None,
    again: Expected = 0,
    data: Any = None,
    seed: int = 0,
    lowerings: Sequence[str] = ("eager", "onnxruntime"),
    process: FreshProcess | None = None,
) -> dict[str, str]:
    """Hold a pass against every check of the kit, on one model; what each found, by the check's name.

    ``step`` is a pass with its options, or pipeline text of one; ``model`` is a module with example inputs, a program,
    or a ``Subject``, which keeps its captures from pass to pass. ``changes`` are the module paths that the pass changes
    there, all of them, or how many; 0 for a model without a place for it, whose result is not tried further.
    ``near_miss`` maps the path of a place that must be left alone to words of the reason. ``again`` is what a second run
    changes. ``data`` goes to ``context.data``. Every backend in ``lowerings`` must agree with the result. ``process``
    lets several calls share one fresh process.

    Raises PassCheckError, an AssertionError that names the check, at the first one that fails.
    """
    subject = model if isinstance(model, Subject) else Subject(model, args, kwargs)
    trial = Trial(_one(step), subject, changes, near_miss or {}, again, data, seed, tuple(lowerings), process)
    made = {name: check for name, check in CHECKS.items() if changes or name not in OF_RESULTS}
    found = {name: _checked(name, check, trial) for name, check in made.items()}
    return {name: found.get(name, "not checked: the result is the program itself") for name in CHECKS}


def _one(step: Pass | str) -> Pass:
    steps = as_passes(step)
    if len(steps) != 1:
        raise RewriteError(f"the kit checks one pass at a time, not {len(steps)}: {step}")
    return steps[0]


def _checked(name: str, check: Check, trial: Trial) -> str:
    try:
        return check(trial)
    except AssertionError:
        raise
    except Exception as error:
        raise PassCheckError(name, f"{type(error).__name__}: {error}") from error


def check_refused(
    step: Pass | str,
    model: nn.Module | Program | Subject,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    reason: str,
    data: Any = None,
) -> str:
    """A pass refuses a model whose precondition fails, before its first edit: a RewriteError that says ``reason``."""
    subject = model if isinstance(model, Subject) else Subject(model, args, kwargs)
    trial = Trial(_one(step), subject, 0, data=data)
    try:
        trial.run(trial.program, check="refused")
    except VerificationError as error:
        raise fail("refused", f"it breaks its contract instead: {error}") from error
    except RewriteError as error:
        if reason not in str(error):
            raise fail("refused", f"it is refused because {str(error)!r}, which does not say {reason!r}") from error
        return str(error)
    raise fail("refused", f"it runs, and should be refused: {reason}")
