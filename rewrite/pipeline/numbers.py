"""Lists of numbers in an option's text: `0,2,5-7`."""

from __future__ import annotations

import re

from rewrite.errors import RewriteError

_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def numbers(text: str) -> tuple[int, ...]:
    """The numbers that a text lists, with ranges that include both ends, ascending, each once: "2,0-1" gives (0, 1, 2).

    Raises RewriteError for anything else, and for a range that runs down.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise RewriteError(f"{text!r} is no list of numbers; write them like '0,2,5-7'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RewriteError(f"{part.strip()!r} runs down; write '{last}-{first}'")
        found.update(range(first, last + 1))
    return tuple(sorted(found))
