"""The table of every pass and the tiny models it is tried on. A pass's own test file holds its rows, as `ROWS`."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import rewrite
from rewrite.testing import Subject
from rewrite.testing.trial import Expected
from tests.captures import shared, stored
from tests.compare import CAPTURED, case

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """A pass (its pipeline text) on a model (the name of a case), and what the kit is to expect of it there.

    One row of each family is `compiled`: its result goes through Inductor as well. `data` makes what the pass is given.
    `after` is a pipeline that runs before, for a pass that needs what another one makes.
    """

    step: str
    model: str
    changes: Expected
    near_miss: Mapping[str, str] = field(default_factory=dict)
    again: Expected = 0
    compiled: bool = False
    data: Callable[[], Any] = lambda: None
    after: str = ""

    @property
    def name(self) -> str:
        """The pass's name."""
        return self.step.partition("{")[0]


def passes() -> dict[str, str]:
    """The test module of every built-in pass by the pass's name, from the entry points."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    homes = project["project"]["entry-points"]["rewrite.passes"]
    return {name: _test_module(home.partition(":")[0]) for name, home in homes.items()}


def _test_module(home: str) -> str:
    folder, _, file = home.removeprefix("rewrite.").rpartition(".")
    return f"tests.{folder}.test_{file}"


def rows() -> list[tuple[str, Row]]:
    """Every row, with the family that its pass belongs to."""
    modules = sorted({*passes().values()})
    return [(module.split(".")[-2], row) for module in modules for row in import_module(module).ROWS]


@functools.cache
def cheapest() -> tuple[Row, ...]:
    """Two rows of each pass: of those that change something and of those that change nothing the cheapest to try."""
    chosen = []
    for name in passes():
        for changes in (True, False):
            those = [row for _, row in rows() if row.name == name and bool(row.changes) == changes]
            chosen.append(min(those, key=_cost))
    return tuple(chosen)


def _cost(row: Row) -> tuple[bool, int]:
    costs = {"stress": 0, "transformers": 1, "timm": 2}
    return bool(row.after), 3 if row.model == "t5" else costs[case(row.model).library]


class SharedSubject(Subject):
    """A case as a subject. Its captures are made once a test run, by whichever worker is first, and read by the others."""

    def __init__(self, name: str) -> None:
        chosen = case(name)
        super().__init__(chosen.build(), *chosen.inputs(*CAPTURED))
        self.name = name

    @cached_property
    def program(self) -> rewrite.Program:
        return shared(self.name)

    def _cast(self, to: torch.dtype | torch.device) -> rewrite.Program | None:
        return stored(f"{self.name} {to}", lambda: super(SharedSubject, self)._cast(to))


class Prepared(Subject):
    """A subject after a pipeline. It has no class of the user's any more."""

    def __init__(self, base: Subject, pipeline: str) -> None:
        super().__init__(rewrite.apply(base.program, pipeline, verify=False))
        self.base, self.pipeline = base, pipeline

    def _cast(self, to: torch.dtype | torch.device) -> rewrite.Program | None:
        found = self.base._cast(to)
        return None if found is None else rewrite.apply(found, self.pipeline, verify=False)


@functools.cache
def subject(name: str, after: str = "") -> Subject:
    """The case of that name (after a pipeline), one subject for all passes in this worker."""
    return Prepared(subject(name), after) if after else SharedSubject(name)
