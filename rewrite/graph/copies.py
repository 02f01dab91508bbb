"""Deep copies of modules: what `copy.deepcopy` makes, without its detour over pickling for each of a thousand layers."""

from __future__ import annotations

import copy
import gc
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, types.FunctionType)
_PLAIN = (dict, set, list, OrderedDict)
_OWN = frozenset(vars(nn.Module()))
_HOOKS = ("__deepcopy__", "__copy__", "__getstate__", "__reduce__", "__reduce_ex__", "__setstate__", "__new__")


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, for making many objects that stay: a collector goes through all of them again and again
    as they become more, and finds none that is garbage.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def copied(module: M, memo: dict[int, Any]) -> M:
    """``copy.deepcopy(module, memo)``; raises what that raises.

    Modules of classes that say themselves how they are copied, and all values but plain ones, are left to it.
    """
    known: Any = memo.get(id(module))
    if known is not None:
        return known  # type: ignore[no-any-return]
    kind = type(module)
    if any(getattr(kind, hook, None) is not getattr(nn.Module, hook, None) for hook in _HOOKS):
        return copy.deepcopy(module, memo)
    made = kind.__new__(kind)
    memo[id(module)] = made
    for name, value in vars(module).items():
        if name == "_modules":
            made.__dict__[name] = copied_children(value, memo)
        elif name in _OWN and value is not None and not value:
            made.__dict__[name] = type(value)()  # no hooks, no buffers: dicts that are no one else's
        else:
            made.__dict__[name] = _copied(value, memo)
    return made


def copied_children(children: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """The ``_modules`` of a module, each copied."""
    return {name: copied(child, memo) if isinstance(child, nn.Module) else child for name, child in children.items()}


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if id(value) in memo or kind not in _PLAIN or (value and not (kind is dict and all(type(key) is str for key in value))):
        return copy.deepcopy(value, memo)
    made: Any = kind()
    memo[id(value)] = made  # what several modules share is shared by their copies
    if kind is dict:
        made.update({key: _copied(held, memo) for key, held in value.items()})
    return made
