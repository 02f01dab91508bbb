"""Healing on the command line: of a model by its original, or after the passes of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.errors import RewriteError
from rewrite.files.staging import check_place
from rewrite.pipeline.settings import Tick

from .job import Model, read_data

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.settings import Listener
    from rewrite.sources.data import Data


@dataclass(frozen=True)
class Cure:
    """How to heal: the data, the original where it is not the model before the passes, and what `rewrite.heal` takes."""

    data: Path
    teacher: Model | None = None
    steps: int = 200
    lr: float = 5e-4
    loss: str = "auto"
    checkpoint: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The files that it reads."""
        return [self.data, *([Path(self.teacher.spec)] if self.teacher is not None else [])]

    def check(self) -> None:
        """Raises RewriteError for a teacher that is not there, and a checkpoint that cannot be written."""
        if self.teacher is not None:
            self.teacher.check()
        if self.checkpoint is not None:
            check_place(self.checkpoint)

    def healed(self, result: Program, before: Program, earlier: int, seed: int, listener: Listener) -> Program:
        """The result of a run's passes, healed; as it is where they changed nothing."""
        if self.teacher is None and not any(record.changes for record in result.history[earlier:]):
            return result
        teacher = before if self.teacher is None else self.teacher.read(listener, self.samples())[0]
        from rewrite.healing.healed import heal

        loss: Any = self.loss
        return heal(
            result,
            teacher,
            self.samples(),
            steps=self.steps,
            lr=self.lr,
            loss=loss,
            seed=seed,
            checkpoint=self.checkpoint,
            listener=lambda text: listener(Tick(text)),
        )

    def samples(self) -> Data:
        """What it learns from. Raises RewriteError for what cannot be read."""
        try:
            found = read_data(self.data)
        except RewriteError as error:
            raise RewriteError(f"{error} (what healing learns from)") from None
        assert found is not None
        return found

    def end(self) -> None:
        """Take the checkpoint away: the result is written."""
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
