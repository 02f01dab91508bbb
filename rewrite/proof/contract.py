"""What a pass promises to keep."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn


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
_FORWARD = {SAME, CLOSE, NEW}
_BACKWARD = {SAME, ESTIMATE, NEW}


@dataclass(frozen=True)
class Contract:
    """The promise of a pass for the forward (SAME, CLOSE, NEW) and for the gradient (SAME, ESTIMATE, NEW)."""

    forward: Promise
    backward: Promise

    def __post_init__(self) -> None:
        if self.forward not in _FORWARD:
            raise ValueError(f"forward is one of SAME, CLOSE, NEW, not {self.forward}")
        if self.backward not in _BACKWARD:
            raise ValueError(f"backward is one of SAME, ESTIMATE, NEW, not {self.backward}")
        if self.forward is not SAME and self.backward is SAME:
            raise ValueError("the gradient of another forward cannot be the same: backward is NEW")

    def __str__(self) -> str:
        return f"forward {self.forward.value}, backward {self.backward.value}"


class Promising(Protocol):
    """What the proof needs of a pass: its contract, and the formula of what it inserts."""

    def contract(self) -> Contract: ...

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor: ...
