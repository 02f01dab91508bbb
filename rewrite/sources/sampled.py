"""Example inputs of a model that data is given for: what the data does not have need not be an input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError

from .data import Call, Data
from .images import BATCH
from .input_text import Inputs
from .inputs import infer_inputs


def inputs_for(model: nn.Module, data: Data | None, *, seed: int = 0) -> Inputs:
    """What `infer_inputs` infers, without optional arguments that the data lacks; where nothing can be inferred, the
    data's first samples.

    Tensors without names are the first arguments. A language model that is given token ids alone so is captured without a
    mask, and a model of images for their size in the data. Raises RewriteError as `infer_inputs` does where there is no
    data, and for data that cannot be read.
    """
    try:
        args, kwargs = infer_inputs(model, seed=seed)
    except RewriteError:
        if data is None:
            raise
        return _first(model, data)
    call = None if data is None else next(data.calls(BATCH), None)
    if call is None:
        return args, kwargs
    args, kwargs = _sized(args, kwargs, call)
    parameters = inspect.signature(model.forward).parameters
    given = {*list(parameters)[: len(call.args)], *call.kwargs}
    optional = {name for name, parameter in parameters.items() if parameter.default is not parameter.empty}
    kept = {name: value for name, value in kwargs.items() if name in given or name not in optional}
    return (args, kept) if args or kept else (args, kwargs)


def _sized(args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Inputs:
    """The same inputs, but for floating ones whose sizes are others in a call of the data: those are the call's."""
    named = dict(zip([*range(len(args)), *kwargs], [*args, *kwargs.values()], strict=True))
    for name, given in (*zip(named, call.args, strict=False), *call.kwargs.items()):
        value = named.get(name)
        if not isinstance(given, torch.Tensor) or not isinstance(value, torch.Tensor) or given.dim() != value.dim():
            continue
        if value.is_floating_point() and given.shape[1:] != value.shape[1:]:
            named[name] = given[: len(value)].to(value.dtype)
    values = list(named.values())
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _first(model: nn.Module, data: Data) -> Inputs:
    """The first samples of data; of what they are named by, what the model's forward knows."""
    call = next(data.calls(BATCH), None)
    if call is None:
        raise RewriteError("the data is empty")
    parameters = inspect.signature(model.forward).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters}
    return call.args, {n: v for n, v in call.kwargs.items() if anything or n in known or not call.spare}
