"""What a module is given and may change, such as a cache of keys: the same once more for a second forward."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_PLAIN = (torch.Tensor, nn.Module, int, float, str, type(None), torch.dtype, torch.device, FunctionType, type)


def replaying(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """``run``, which from its second call on is given the objects among these arguments as they are now.

    Their tensors are shared, not copied; an object that cannot be copied is given as it has become. Arguments among which
    there are only tensors, modules and plain values leave ``run`` as it is.
    """
    if all(map(_is_plain, (*args, *kwargs.values()))):
        return run
    before = [_copied(each) for each in args], {name: _copied(each) for name, each in kwargs.items()}
    calls = itertools.count()

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            return run(*args, **kwargs)
        # a tensor comes from the call, which has it with its history
        places = [new if _is_plain(new) else _copied(old) for new, old in zip(args, before[0], strict=True)]
        return run(*places, **{name: new if _is_plain(new) else _copied(before[1][name]) for name, new in kwargs.items()})

    return called


def _is_plain(value: Any) -> bool:
    """Whether a call cannot change it, tensors and modules aside."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _copied(value: Any) -> Any:
    if _is_plain(value):
        return value
    try:
        with _TensorsShared():
            return copy.deepcopy(value)
    except Exception:  # whatever its own code says: it is no object to be copied
        return value


class _TensorsShared(TorchFunctionMode):
    """A deep copy inside has the tensors themselves."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.__deepcopy__ else func(*args, **(kwargs or {}))
