"""Values of a file's JSON, checked one by one: what is no name, number or path of the expected kind is refused."""

from __future__ import annotations

import json
import keyword
import re
from typing import Any

from rewrite.errors import RewriteError

Json = Any

LONGEST_NAME = 1000
LARGEST = 2**63 - 1
DIMENSIONS = 64
DEPTH = 64
_SYMBOL = re.compile(r"[A-Za-z_]{1,40}\d{0,6}")


def parsed(content: bytes, what: str) -> Any:
    """A JSON document. Raises RewriteError for damage, and for nesting that no program has."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise RewriteError(f"its {what} is no JSON") from None
    _check_depth(found, what)
    return found


def _check_depth(value: Any, what: str) -> None:
    level = [value]
    for _ in range(4 * DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise RewriteError(f"its {what} is nested deeper than any program")


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def name(value: Any, what: str = "name") -> str:
    """A Python identifier that is no keyword: names become text of generated code."""
    if not isinstance(value, str) or not value.isidentifier() or keyword.iskeyword(value) or len(value) > LONGEST_NAME:
        raise RewriteError(f"it has the {what} {shown(value)}, which is no identifier")
    return value


def words(value: str, what: str = "text") -> str:
    """A text of an argument, such as an equation or a mode: it becomes a literal of generated code, and holds none."""
    if len(value) <= LONGEST_NAME and value.isprintable() and not set(value) & set("'\"\\`{}()"):
        return value
    raise RewriteError(f"it has the {what} {shown(value)}, which is no plain text")


def path(value: Any, what: str = "path") -> str:
    """A dotted path of modules, parameters or buffers. Its parts may be any words without quotes and escapes."""
    if isinstance(value, str) and value and len(value) <= 10 * LONGEST_NAME:
        parts = value.split(".")
        if all(part and part.isprintable() and not set(part) & set("'\"\\`{}") for part in parts):
            return value
    raise RewriteError(f"it has the {what} {shown(value)}, which is no path of names")


def part(value: Any, what: str = "name") -> str:
    """One part of a path."""
    found = path(value, what)
    if "." in found:
        raise RewriteError(f"it has the {what} {shown(value)}, which holds a dot")
    return found


def symbol(value: Any) -> str:
    """The name of a dynamic size, as ``s77``."""
    if not isinstance(value, str) or not _SYMBOL.fullmatch(value):
        raise RewriteError(f"it has the size {shown(value)}, which is no name of a size")
    return value


def text(value: Any, what: str = "text") -> str:
    """A text."""
    if not isinstance(value, str):
        raise RewriteError(f"its {what} is {shown(value)} and no text")
    return value


def truth(value: Any, what: str = "flag") -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise RewriteError(f"its {what} is {shown(value)} and neither true nor false")
    return value


def whole(value: Any, what: str = "number", low: int = -LARGEST, high: int = LARGEST) -> int:
    """An integer within bounds, by default those of 64 bits."""
    if type(value) is not int or not low <= value <= high:
        raise RewriteError(f"its {what} is {shown(value)}, where a number from {low} to {high} belongs")
    return value


def size(value: Any) -> int:
    """A number that is not negative."""
    return whole(value, "size", 0)


def items(value: Any, what: str = "list", limit: int = LARGEST) -> list[Any]:
    """A list of at most so many items."""
    if not isinstance(value, list) or len(value) > limit:
        raise RewriteError(f"its {what} is {shown(value)} and no list" + (f" of at most {limit}" if limit < LARGEST else ""))
    return value


def table(value: Any, what: str = "table", *keys: str) -> dict[str, Any]:
    """A JSON object that has the given keys."""
    if not isinstance(value, dict):
        raise RewriteError(f"its {what} is {shown(value)} and no table")
    missing = [key for key in keys if key not in value]
    if missing:
        raise RewriteError(f"its {what} lacks {missing[0]!r}")
    return value


def shown(value: Any) -> str:
    """A value on one line, cut to what fits into an error."""
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}..."
