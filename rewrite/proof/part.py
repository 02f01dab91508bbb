"""One part of a program as a pass sees it: the layers that stood there and those that stand there now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Part:
    """A part that a pass changed, to be computed anew from the method's formula.

    ``old`` and ``new`` hold its layers by path, in the order of the graph, as copies whose tensors count for gradients. The
    layers of ``new`` that are not torch.nn's own cannot be called: their formula is to be written, not asked for.
    """

    old: Mapping[str, nn.Module]
    new: Mapping[str, nn.Module]

    @property
    def replaced(self) -> tuple[nn.Module | None, nn.Module] | None:
        """The old layer (None where it was not one) and the new one, where the part now is a single layer; else None."""
        if len(self.new) != 1:
            return None
        old = next(iter(self.old.values())) if len(self.old) == 1 else None
        return old, next(iter(self.new.values()))
