"""Functions that remember what they gave (``functools.lru_cache``): during a trace they would keep its fake tensors, for the
next trace and for the model's own next call.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from typing import Any

from torch import nn


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """What functions in the modules of a model's classes remember is forgotten, before and after."""
    remembering = list(_remembering(model))
    for function in remembering:
        function.cache_clear()
    try:
        yield
    finally:
        for function in remembering:
            function.cache_clear()


def _remembering(model: nn.Module) -> Iterator[_lru_cache_wrapper[Any]]:
    kinds = {kind for part in model.modules() for kind in type(part).__mro__ if kind.__module__ != nn.Module.__module__}
    names = {kind.__module__ for kind in kinds if not kind.__module__.startswith("torch.")}
    spaces = [vars(kind) for kind in kinds] + [vars(sys.modules[name]) for name in names if name in sys.modules]
    for value in [value for space in spaces for value in list(space.values())]:
        cells = inspect.getclosurevars(value).nonlocals.values() if isinstance(value, types.FunctionType) else ()
        yield from (each for each in (value, *cells) if isinstance(each, _lru_cache_wrapper))
