"""The steps of a long run on a terminal: what runs now, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rewrite.pipeline.settings import Tick

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

PATIENCE = 2.0
"""Seconds that pass before anything is shown."""
SHOWN = 8
"""How many finished steps stay in sight."""


class Steps:
    """Called with the name of each step as it begins; shows the steps with their seconds while a run takes long.

    Nothing is written unless the console is a terminal, and nothing stays on it once the context is left.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self.finished: list[tuple[str, float]] = []
        self.current = ""
        self.began = self.step_began = time.monotonic()
        self.spinner = Spinner("dots" if console.encoding.startswith("utf") else "line", style="cyan")
        self.live = Live(self, console=console, transient=True, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, step: str) -> None:
        now = time.monotonic()
        if isinstance(step, Tick) and isinstance(self.current, Tick):
            self.current = step
            return
        if self.current:
            self.finished.append((self.current, now - self.step_began))
        self.current, self.step_began = step, now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        now = time.monotonic()
        if now - self.began < PATIENCE or not self.current:
            return
        for step, seconds in self.finished[-SHOWN:]:
            yield _line(Text(f"  {step}", "dim"), seconds)
        self.spinner.update(text=_line(Text(self.current), now - self.step_began))
        yield self.spinner


def _line(text: RenderableType, seconds: float) -> RenderableType:
    from rich.text import Text

    assert isinstance(text, Text)
    line = Text.assemble(text, (f"  {seconds:.1f} s", "cyan"))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line
