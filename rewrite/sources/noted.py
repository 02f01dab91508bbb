"""Folders with a `rewrite.json`: a timm model by name and arguments, a class of the user's own by its constructor's.

What the note names is never called before it is known: a timm model's arguments are plain and none of those that fetch or
read files; a class of the user's own is code, which only the user can trust.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from rewrite.errors import RewriteError, first_line

FORMAT = 1
NOTE, WEIGHTS = "rewrite.json", "model.safetensors"
_LARGEST = 1 << 20
_FETCHING = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"}
)


@dataclass(frozen=True)
class Noted:
    """What a note says: `timm:NAME` or `package.module:Class`, and the arguments."""

    model: str
    arguments: Mapping[str, Any]

    @property
    def timm(self) -> str:
        """The name of a timm model, empty for a class."""
        return self.model.removeprefix("timm:") if self.model.startswith("timm:") else ""


def is_noted(folder: Path) -> bool:
    """Whether a folder is one that this package wrote."""
    return (folder / NOTE).is_file() and not (folder / "config.json").exists()


def read_note(folder: Path) -> Noted:
    """The note of a folder. Raises RewriteError where it is none that this package wrote."""
    place = folder / NOTE
    try:
        if place.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        note = json.loads(place.read_text(encoding="utf-8"))
        if note["format"] != FORMAT:
            raise RewriteError(f"{place} is of format {note['format']!r}, this version reads {FORMAT}")
        model, arguments = note["model"], note["arguments"]
        if not isinstance(model, str) or ":" not in model or not isinstance(arguments, dict):
            raise ValueError("it names no model")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RewriteError(f"{place} cannot be read: {first_line(error)}") from None
    fetching = sorted(_FETCHING & arguments.keys()) if model.startswith("timm:") else []
    if fetching:
        raise RewriteError(f"{place} has {fetching[0]} among its arguments, which reads other files: take it out")
    if not (folder / WEIGHTS).is_file():
        raise RewriteError(f"{folder} has a {NOTE} but no {WEIGHTS}")
    return Noted(model, arguments)


def built(noted: Noted) -> nn.Module:
    """The user's own class, called with the arguments. The user trusts it; whatever its code raises is passed on."""
    kind = _named(noted.model)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise RewriteError(f"{noted.model} is no class of a model")
    made: nn.Module = kind(**{name: _value(held) for name, held in noted.arguments.items()})
    return made


def _named(spec: str) -> Any:
    home, _, name = spec.partition(":")
    found: Any = importlib.import_module(home)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _value(held: Any) -> Any:
    """An argument: a record is written as its class and what it holds."""
    if isinstance(held, dict) and held.keys() == {"class", "arguments"}:
        inner = {name: _value(each) for name, each in held["arguments"].items()}
        return SimpleNamespace(**inner) if held["class"] == "types:SimpleNamespace" else _named(held["class"])(**inner)
    if isinstance(held, dict):
        return {name: _value(each) for name, each in held.items()}
    return [_value(each) for each in held] if isinstance(held, list) else held
