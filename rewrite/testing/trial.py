"""One pass on one model, and what its author expects of it: what every check is given."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rewrite.errors import RewriteError
from rewrite.files.store import save
from rewrite.graph.history import Record
from rewrite.graph.program import Program
from rewrite.pipeline.pass_ import Pass
from rewrite.pipeline.run import apply

from .fresh import FreshProcess
from .subject import Subject

Expected = int | Collection[str]
"""The paths that change, all of them; or only how many."""


class PassCheckError(AssertionError):
    """A pass failed a check of the kit; ``check`` is the check's name."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


@dataclass(frozen=True)
class Trial:
    """A pass, a subject, and what is expected: what it changes there, what a second run changes (nothing, by default),
    and a piece of the reason with which each near miss is left alone.

    ``data`` is what the pass is given in ``context.data``, ``lowerings`` are the backends that must agree.
    """

    step: Pass
    subject: Subject
    changes: Expected
    near_miss: Mapping[str, str] = field(default_factory=dict)
    again: Expected = 0
    data: Any = None
    seed: int = 0
    lowerings: tuple[str, ...] = ("eager", "onnxruntime")
    process: FreshProcess | None = None

    @property
    def program(self) -> Program:
        """The subject's program, before the pass."""
        return self.subject.program

    @cached_property
    def result(self) -> Program:
        """The program after the pass, without its proof. Checks call copies of it."""
        try:
            return self.run(self.program)
        except RewriteError as error:
            raise PassCheckError("runs", f"{self.step.text} is refused: {error}") from error

    @cached_property
    def _place(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="rewrite-")

    @property
    def folder(self) -> Path:
        """A folder for what checks write; it goes with the trial."""
        return Path(self._place.name)

    @property
    def record(self) -> Record:
        """What the pass says it did."""
        return self.result.history[-1]

    @property
    def paths(self) -> list[str]:
        """The paths that the pass changed."""
        return changed_paths(self.result)

    @cached_property
    def file(self) -> Path:
        """The result, saved. Raises RewriteError as ``rewrite.save`` does."""
        return save(self.result, self.folder / "result.pt2")

    def run(
        self, program: Program, step: Pass | None = None, *, check: str = "runs", data: Any = None, **options: Any
    ) -> Program:
        """The pass (or another setting of it) over a program, unproven unless ``verify`` asks for it.

        RewriteError and VerificationError are the caller's; whatever else the pass raises fails ``check``.
        """
        step = step or self.step
        options = {"verify": False, "seed": self.seed, "crash_folder": self.folder, **options}
        try:
            return apply(program, step, data=self.data if data is None else data, **options)
        except RewriteError:
            raise
        except Exception as error:
            raise PassCheckError(check, f"{step.text} raised {type(error).__name__}: {error}") from error


def changed_paths(program: Program) -> list[str]:
    """The paths that the last pass changed, each once, in order."""
    return list(dict.fromkeys(site.path for site in program.history[-1].changes))


def fail(check: str, message: str) -> PassCheckError:
    """The error of a check, for ``raise``."""
    return PassCheckError(check, message)


def differs_from(expected: Expected, paths: Collection[str]) -> str:
    """In what the changed paths are not the expected ones, in words; empty if they are."""
    if isinstance(expected, int):
        return "" if len(paths) == expected else f"{expected} places should change, {len(paths)} did: {_listed(paths)}"
    missing, extra = sorted({*expected} - {*paths}), sorted({*paths} - {*expected})
    words = [f"{_listed(missing)} should change and did not"] if missing else []
    words += [f"{_listed(extra)} changed and should not"] if extra else []
    return "; ".join(words)


def _listed(paths: Collection[str]) -> str:
    return ", ".join([*paths][:5]) + ", ..." * (len(paths) > 5) or "none"
