"""What a pass promises to keep."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from .part import Part


class Promise(enum.Enum):
    """How close a rewritten program stays to the one it came from.

    SAME: equal up to rounding. CLOSE: an approximation whose error is reported. NEW: another function, to be trained.
    ESTIMATE: forward untouched, gradient approximated.
    """

    SAME = "same"
    CLOSE = "close"
    NEW = "new"
    ESTIMATE = "estimate"


SAME, CLOSE, NEW, ESTIMATE = Promise.SAME, Promise.CLOSE, Promise.NEW, Promise.ESTIMATE
_FORWARD = (SAME, CLOSE, NEW)
_BACKWARD = (SAME, ESTIMATE, NEW)


@dataclass(frozen=True)
class Contract:
    """The promise of a pass for the forward (SAME, CLOSE, NEW) and for the gradient (SAME, ESTIMATE, NEW).

    ``bound`` is the largest relative error (root mean square) of a CLOSE part at the values that flow into it, or of an
    ESTIMATE's gradient; ``cosine`` the smallest cosine of that gradient with the true one. ``evaluation_only`` promises
    nothing of training mode.
    """

    forward: Promise
    backward: Promise
    bound: float | None = None
    cosine: float | None = None
    evaluation_only: bool = False

    def __post_init__(self) -> None:
        if self.forward not in _FORWARD:
            raise ValueError(f"forward is one of SAME, CLOSE, NEW, not {self.forward}")
        if self.backward not in _BACKWARD:
            raise ValueError(f"backward is one of SAME, ESTIMATE, NEW, not {self.backward}")
        if self.forward is not SAME and self.backward is SAME:
            raise ValueError("the gradient of another forward cannot be the same: backward is NEW")

    @property
    def error_bound(self) -> float:
        """The bound that counts: the contract's own, or the loosest that there is."""
        return self.bound if self.bound is not None else (0.6 if self.forward is CLOSE else 0.5)

    @property
    def cosine_bound(self) -> float:
        """The smallest cosine of an estimated gradient with the true one that counts: the contract's own, or 0.9."""
        return self.cosine if self.cosine is not None else 0.9

    def covers(self, other: Contract) -> bool:
        """Whether what keeps ``other`` keeps this contract too: ``other`` promises as much, or more."""
        forward = _FORWARD.index(self.forward) >= _FORWARD.index(other.forward)
        backward = _BACKWARD.index(self.backward) >= _BACKWARD.index(other.backward)
        return forward and backward and (self.evaluation_only or not other.evaluation_only)

    def __str__(self) -> str:
        text = f"forward {self.forward.value}, backward {self.backward.value}"
        return f"{text}, evaluation only" if self.evaluation_only else text


class NoFormulaError(Exception):
    """A pass does not say what the proof is to hold its result against."""


class Promising(Protocol):
    """What the proof needs of a pass: its contract, and the method's own formulas of what it changes."""

    def contract(self) -> Contract: ...

    def formula(self, part: Part, *inputs: torch.Tensor) -> Any: ...

    def gradient(self, part: Part, inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor]) -> Any: ...
