"""What a pass works with while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from rewrite.errors import RewriteError, did_you_mean
from rewrite.graph.edit import Editor
from rewrite.graph.history import Measured, Skipped
from rewrite.sources.data import Data

from .select import Selector
from .settings import Listener, Tick


class Selectable(Protocol):
    """What a selector can choose: something with a module path and type names."""

    @property
    def path(self) -> str: ...

    @property
    def types(self) -> tuple[str, ...]: ...


S = TypeVar("S", bound=Selectable)
NOT_SELECTED = "not selected by where="
"""How the reason begins with which a place is left alone that the selector does not choose."""


@dataclass
class Context:
    """What a pass works with: the editor, a place to note what it left alone or warns of, the seed, the data.

    ``data`` may be gone through any number of times; None where the run was given none.
    """

    edit: Editor
    seed: int = 0
    data: Data | None = None
    listener: Listener = lambda step: None
    skipped: list[Skipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)

    def skip(self, path: str, reason: str) -> None:
        """Note a place that was eligible and is left alone."""
        self.skipped.append(Skipped(path, reason))

    def warn(self, message: str) -> None:
        """Note something that the user should know before using the result."""
        self.warnings.append(message)

    def measure(self, path: str, **figures: float | str) -> None:
        """Note what was measured at a place, for the table of the report: one column a name."""
        self.measured.append(Measured(path, figures))

    def progress(self, done: int, total: int | None) -> None:
        """Tell how much of the data was gone through; to be handed to ``observe``."""
        self.listener(Tick(f"observing {done}{'' if total is None else f' of {total}'}"))

    def choose(self, sites: Iterable[S], where: Selector) -> list[S]:
        """The sites that a selector chooses; the others are noted as skipped.

        Raises RewriteError when there are sites and the selector matches none of them.
        """
        sites = list(sites)
        chosen = [s for s in sites if where.matches(s.path, s.types)]
        if sites and not chosen:
            paths = [s.path for s in sites]
            hint = did_you_mean(str(where), paths) or f"; there are {', '.join(paths[:5])}" + ", ..." * (len(paths) > 5)
            raise RewriteError(f"where={where} matches none of the {len(sites)} places this pass can change{hint}")
        kept = {id(s) for s in chosen}
        for site in sites:
            if id(site) not in kept:
                self.skip(site.path, f"{NOT_SELECTED}{where}")
        return chosen
