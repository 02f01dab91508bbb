"""The kit that holds every pass against the same checks: a pass's test says what it changes, the kit does the rest.

    from rewrite.testing import check_pass

    check_pass("dyt", model, (x,), changes={"norm1", "norm2"})

A single check is a function of a ``Trial``: ``check_twice(Trial(step, Subject(model, (x,)), changes=2))``. Each raises
one ``PassCheckError`` that names it, and returns what it found in words.
"""

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
from .kit import CHECKS, check_pass, check_refused
from .lowered import check_captured_again, check_grafted, check_lowered
from .subject import Subject
from .texts import check_described, check_text
from .trial import PassCheckError, Trial

__all__ = [
    "CHECKS",
    "FreshProcess",
    "PassCheckError",
    "Subject",
    "Trial",
    "check_bfloat16",
    "check_captured_again",
    "check_changes",
    "check_copied",
    "check_described",
    "check_deterministic",
    "check_elsewhere",
    "check_fresh",
    "check_grafted",
    "check_lowered",
    "check_meta",
    "check_near_miss",
    "check_partial",
    "check_pass",
    "check_proof",
    "check_refused",
    "check_saved",
    "check_text",
    "check_trained",
    "check_twice",
    "check_untouched",
]
