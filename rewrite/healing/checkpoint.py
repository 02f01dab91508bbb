"""Where a healing stands, written as it goes, so that one that was stopped goes on from there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewrite.errors import RewriteError, first_line
from rewrite.files.staging import Staging, explained


@dataclass
class Standing:
    """The state after ``step`` steps: parameters and their best values so far, the optimizer, the losses held back.

    ``stale`` counts looks at the held-back loss without a better one, ``fits`` what least squares did.
    """

    step: int
    tensors: list[torch.Tensor]
    best: list[torch.Tensor]
    first: float
    least: float
    optimizer: dict[str, Any]
    stale: int = 0
    fits: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A file for one healing: ``mark`` tells it from others. Without a path nothing is written."""

    path: Path | None
    mark: str

    def read(self) -> Standing | None:
        """What stands in the file; None where there is none.

        Raises RewriteError for a file that is damaged, or of another healing.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            found = torch.load(self.path, weights_only=True)
            mark = found.pop("mark")
            standing = Standing(**found)
        except Exception as error:  # a damaged file may raise anything
            raise RewriteError(f"{self.path} is no checkpoint of a healing: {first_line(error)}") from None
        if mark != self.mark:
            raise RewriteError(
                f"{self.path} is of another healing (other model, teacher, data or options): give another file, or remove it"
            )
        return standing

    def write(self, standing: Standing) -> None:
        """Put the file in the place of the one before, whole or not at all."""
        if self.path is None:
            return
        with Staging() as staging, explained(self.path):
            torch.save({"mark": self.mark, **_fields(standing)}, staging.path(self.path))


def _fields(standing: Standing) -> dict[str, Any]:
    plain = {name: getattr(standing, name) for name in Standing.__dataclass_fields__}
    return {**plain, "fits": [tuple(each) for each in standing.fits]}
