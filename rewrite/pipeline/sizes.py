"""Sizes as users write them: absolute (`512`), more (`+64`) or times (`2x`, `1.5x`)."""

from __future__ import annotations

import math
import re

from rewrite.errors import RewriteError

_SIZE = re.compile(r"(?P<times>\d+(\.\d+)?)x|\+(?P<more>\d+)|(?P<size>\d+)")


def check_size(text: str, option: str) -> None:
    """Raise RewriteError for a text that is no size."""
    if not _SIZE.fullmatch(text):
        raise RewriteError(f"{option}={text}: a size is a number (512), more (+64) or times (2x)")


def grown(text: str, name: str, size: int, smaller: str = "random-prune") -> int:
    """The size that a text makes of another one.

    Raises RewriteError for one that is smaller, naming the pass ``smaller`` that is for that, or is no whole number.
    """
    found = _SIZE.fullmatch(text)
    assert found is not None
    times, more, absolute = found["times"], found["more"], found["size"]
    wanted = float(times) * size if times else float(size + int(more) if more else int(absolute))
    if wanted != math.floor(wanted):
        near = math.ceil(wanted)
        raise RewriteError(f"{text} of {name}, which is {size}, is no whole number: {near} is")
    if wanted < size:
        raise RewriteError(f"{name} is {size} and would be {wanted:g}: expand grows; to shrink it is pruning: {smaller}")
    return int(wanted)
