"""The errors that are meant for the user: one clear line saying what is wrong, where, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RewriteError(Exception):
    """A mistake the user can mend. The command line prints its text and exits 2, without a traceback."""


class OptionError(RewriteError):
    """An option that a pass does not have, or a value that does not fit; `option` is its name."""

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option


class PipelineError(RewriteError):
    """A mistake in a pipeline's text, shown as three lines: the message, the text, and a caret at the place.

    Of a text with line breaks, only the line of the mistake is shown.
    """

    def __init__(self, message: str, text: str, position: int) -> None:
        start = text.rfind("\n", 0, position) + 1
        line = text[start:].split("\n", 1)[0].replace("\t", " ")
        super().__init__(f"{message}\n  {line}\n  {' ' * (position - start)}^")
        self.message, self.text, self.position = message, text, position

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str, int]]:
        return type(self), (self.message, self.text, self.position)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `names`, or an empty string where none is near."""
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
