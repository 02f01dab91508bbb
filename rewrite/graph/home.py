"""What a model told of how it was built, noted at its capture: its class, and copies of its plain settings.

It is kept in memory and never in a file: to build a model from it runs the class's constructor.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))


@dataclass(frozen=True)
class Home:
    """The class of a user's model, and the settings that its instance held as attributes, by name."""

    kind: type[nn.Module]
    settings: Mapping[str, Any]


def home_of(model: nn.Module) -> Home:
    """The home of a model. What cannot be copied is left out."""
    found = {}
    for name, value in vars(model).items():
        if not name.startswith("_") and name != "training" and _is_setting(value):
            try:
                found[name] = copy.deepcopy(value)
            except Exception:  # whatever an object of the user's raises, it is no setting
                continue
    return Home(type(model), found)


def is_record(value: Any) -> bool:
    """Whether a value is an object that holds settings as attributes: a configuration, a dataclass, a namespace."""
    if isinstance(value, type | nn.Module | torch.Tensor):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, SimpleNamespace) or hasattr(value, "to_dict")


def _is_setting(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str | int) and _is_setting(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return isinstance(value, _PLAIN) or is_record(value)
