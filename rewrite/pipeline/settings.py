"""How passes are run: what holds for all passes of one ``apply``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rewrite.sources.data import Data


class Listener(Protocol):
    """Told about each step of a pipeline as it begins: for progress displays."""

    def __call__(self, step: str) -> None: ...


def _nobody(step: str) -> None:
    """No display."""


class Tick(str):
    """A step's text told to a listener while the step goes on: how far it has come."""


@dataclass(frozen=True)
class Settings:
    """How to run passes: the seed of all draws, whether to verify, whether to share unchanged tensors with the input, the
    data for passes that take some, where a crash bundle goes, who is told of progress.
    """

    seed: int = 0
    verify: bool = True
    share: bool = False
    data: Data | None = None
    crash_folder: Path = field(default_factory=Path.cwd)
    listener: Listener = _nobody
