"""Functions that remember what they gave (``functools.lru_cache``): during a trace they would keep its fake tensors, for the
next trace and for the model's own next call.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import _lru_cache_wrapper
from unittest import mock

from torch import nn


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """Functions in the modules of a model's classes remember nothing meanwhile; what they hold stays theirs, untouched."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__ if kind.__module__ != nn.Module.__module__}
    names = {kind.__module__ for kind in kinds if not kind.__module__.startswith("torch.")}
    spaces = [*kinds, *(sys.modules[name] for name in names if name in sys.modules)]
    with ExitStack() as stack:
        for space, name, value in [(s, name, value) for s in spaces for name, value in vars(s).items()]:
            if isinstance(value, _lru_cache_wrapper):
                stack.enter_context(mock.patch.object(space, name, value.__wrapped__))
            for cell in (value.__closure__ or ()) if isinstance(value, types.FunctionType) else ():
                stack.enter_context(_plain(cell))
        yield


@contextmanager
def _plain(cell: types.CellType) -> Iterator[None]:
    """What a function wraps, without its memory."""
    try:
        held = cell.cell_contents
    except ValueError:  # an empty cell
        held = None
    if not isinstance(held, _lru_cache_wrapper):
        yield
        return
    cell.cell_contents = held.__wrapped__
    try:
        yield
    finally:
        cell.cell_contents = held
