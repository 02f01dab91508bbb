"""Settings as a tree: the numbers in a configuration, a dataclass or arguments, each at its path, and a copy with others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from rewrite.graph.home import is_record

Path = tuple[str | int, ...]
"""Where a setting stands: names of attributes and keys, numbers of entries of a list."""


def written(path: Path) -> str:
    """A path in words: ``text_config.hidden_size``, ``depths[2]``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def parts(value: Any) -> list[tuple[str | int, Any]]:
    """The settings that a value holds, by name or number; none for a plain one."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if is_record(value):
        return [(name, held) for name, held in vars(value).items() if not name.startswith("_")]
    return []


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every number and None in a tree of settings, and every list of numbers as one."""
    if (
        is_number(value)
        or value is None
        or (isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(v, int | float | str) for v in value))
    ):
        yield path, value
    for key, held in parts(value):
        yield from leaves(held, (*path, key))


def is_number(value: Any) -> bool:
    """Whether a value is a number that could be a size or a ratio."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def edited(value: Any, edits: Mapping[Path, Any]) -> Any:
    """A copy of a tree of settings with other values at some paths."""
    made = copy.deepcopy(value)
    for path, new in edits.items():
        made = _put(made, path, new)
    return made


def _put(holder: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    child = _put(_held(holder, key), rest, value)
    if isinstance(holder, tuple):
        return tuple(child if i == key else old for i, old in enumerate(holder))
    if isinstance(holder, dict | list):
        holder[key] = child  # type: ignore[index]  # a list's keys are numbers
        return holder
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type) and _is_frozen(holder):
        return dataclasses.replace(holder, **{str(key): child})
    setattr(holder, str(key), child)
    return holder


def _held(holder: Any, key: str | int) -> Any:
    if isinstance(holder, Mapping | list | tuple):
        return holder[key]  # type: ignore[index]
    return getattr(holder, str(key), None)


def _is_frozen(value: Any) -> bool:
    return bool(type(value).__dataclass_params__.frozen)
