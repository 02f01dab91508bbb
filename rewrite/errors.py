"""The errors that are meant for the user: one clear line saying what is wrong, where, and the way out."""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Iterable

#: torch's advice to load a file in the unsafe way, which is never passed on.
_ADVICE = re.compile(r"weights[_ ]only", re.IGNORECASE)
_ALLOW = re.compile(r" was not an allowed global by default\. Please use .*")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RewriteError(Exception):
    """A mistake the user can mend. The command line prints its text and exits 2, without a traceback."""


class OptionError(RewriteError):
    """An option that a pass does not have, or a value that does not fit; `option` is its name."""

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option


class PipelineError(RewriteError):
    """A mistake in a pipeline's text, shown as three lines: the message, the text, and a caret at the place.

    Of a text with line breaks, only the line of the mistake is shown, and of a long line what the window holds.
    """

    def __init__(self, message: str, text: str, position: int) -> None:
        start = text.rfind("\n", 0, position) + 1
        line = text[start:].split("\n", 1)[0].replace("\t", " ")
        shown, place = _window(line, position - start, shutil.get_terminal_size().columns - 4)
        super().__init__(f"{message}\n  {shown}\n  {' ' * place}^")
        self.message, self.text, self.position = message, text, position

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str, int]]:
        return type(self), (self.message, self.text, self.position)


def _window(line: str, place: int, width: int) -> tuple[str, int]:
    """The part of a line around a place, at most ``width`` long (40 at least), and the place in it."""
    width = max(width, 40)
    if len(line) <= width:
        return line, place
    start = max(0, min(place - width // 2, len(line) - width))
    shown = line[start : start + width]
    shown = f"...{shown[3:]}" if start else shown
    shown = f"{shown[:-3]}..." if start + width < len(line) else shown
    return shown, place - start


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `names`, or an empty string where none is near."""
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException, limit: int = 300) -> str:
    """What an error says first, on one line of at most ``limit`` characters; its type where it says nothing."""
    lines = (" ".join(line.split()) for line in str(error).splitlines() if not _ADVICE.search(line))
    line = next((printable(_ALLOW.sub("", line)) for line in lines if line), type(error).__name__)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def named_line(error: BaseException, limit: int = 300) -> str:
    """`ValueError: what it says first`, for an error of another library's making."""
    name, line = type(error).__name__, first_line(error, limit)
    return line if line == name else f"{name}: {line}"


def printable(text: str) -> str:
    """The text without colours, and with escapes in place of whatever else could take over a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in _COLOUR.sub("", text))


def one_lined(text: str) -> str:
    """The text as ``printable``, a line break in it, as a file's name may have, as an escape too."""
    return printable(text).replace("\n", "\\n")
