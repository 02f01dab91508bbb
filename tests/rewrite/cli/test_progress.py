"""The steps of a run: each once, one that tells how far it has come too."""

from __future__ import annotations

import io

from rich.console import Console

from rewrite.cli.progress import Steps
from rewrite.pipeline.settings import Tick


def test_a_step_that_goes_on_is_one_step() -> None:
    steps = Steps(Console(file=io.StringIO()))
    for step in ("reading", Tick("observing 1 of 2"), Tick("observing 2 of 2"), "verifying", Tick("observing 1 of 2")):
        steps(step)
    assert [name for name, _ in steps.finished] == ["reading", "observing 2 of 2", "verifying"]
    assert steps.current == "observing 1 of 2"
