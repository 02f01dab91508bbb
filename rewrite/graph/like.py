"""Making a layer that stands in for another: with its tensors, its plain attributes and its mode."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

_HELD = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def like(old: nn.Module, kind: type[M], **own: Any) -> M:
    """A layer of class ``kind`` that holds what ``old`` holds, and ``own`` beside or instead of it.

    It has the very parameters and buffers of ``old``, so that ties stay and what was frozen stays frozen, its children, its
    plain attributes and its mode; hooks are not taken over. In ``own`` a Parameter is a parameter, any other tensor a
    buffer, None takes out what is called so, and all else is a plain attribute. Neither constructor runs: ``kind`` is meant
    to be a subclass of ``old``'s class, or a class whose forward needs no more than this.
    """
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    bare = vars(nn.Module())
    made.__dict__.update({name: value for name, value in vars(old).items() if name not in bare})
    for held in _HELD:
        getattr(made, held).update(getattr(old, held))
    for name, value in own.items():
        _set(made, name, value)
    made.training = old.training
    return made


def _set(made: nn.Module, name: str, value: Any) -> None:
    held = next((h for h in (made._parameters, made._buffers, made._modules) if name in h), None)
    if value is None and held is not None:
        held[name] = None
        return
    if held is not None:
        del held[name]
    made.__dict__.pop(name, None)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        made.register_buffer(name, value)
    else:
        setattr(made, name, value)
