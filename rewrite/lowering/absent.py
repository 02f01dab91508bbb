"""What stands in the user's class where passes took a module out: its code still calls something there.

A block gives back what it is given, and so does a layer that was folded into the one before it. A branch gives zeros, which
its class adds: whether a module holds the addition itself is told by what it gives once all its parameters are 0.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import nn

from rewrite.errors import RewriteError, named_line
from rewrite.graph.program import Program
from rewrite.graph.tree import on_meta
from rewrite.numerics.compare import clone

from .compared import ROUNDING
from .fitting import Gone
from .standing import Call, calls_of, standing, tensors

_STEPPED = ("decoder_input_ids", "input_ids")
"""What grows by a token a step where a model generates, the first that is given."""


class Zeros(nn.Module):
    """0 in the shape of what it is given, or ``width`` of them for each token of that."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) if self.width is None else x.new_zeros(*x.shape[:-1], self.width)

    def extra_repr(self) -> str:
        return "" if self.width is None else str(self.width)


def stand_ins(model: nn.Module, program: Program, gone: Mapping[str, Gone]) -> dict[str, nn.Module]:
    """What stands at each path whose module is ``gone``, without the children of it that are left.

    Raises RewriteError, by name, where a module's call does not tell what could stand there, and without values.
    """
    if gone and on_meta(model):
        raise RewriteError("what stands for a module that was taken out is told by values: the model is on the meta device")
    calls = calls_of(model, program, sorted(gone)) if gone else {}
    return {path: _stand_in(path, model.get_submodule(path), calls[path], each.is_bypassed) for path, each in gone.items()}


def _stand_in(path: str, module: nn.Module, call: Call, is_bypassed: bool) -> nn.Module:
    given, out = [t for _, t in tensors(call.arguments)], next((t for _, t in tensors(call.outputs)), None)
    like = next((t for t in given if out is not None and (t.shape, t.dtype) == (out.shape, out.dtype)), None)
    if like is not None and (is_bypassed or path.rpartition(".")[2].isdigit() or _gives_back(module, call)):
        return standing(path, nn.Identity(), call, like)
    if like is not None:
        return standing(path, Zeros(), call, like)
    tokens = next((t for t in given if out is not None and _has_tokens_of(t, out)), None)
    if tokens is None or out is None:
        raise RewriteError(
            f"nothing that {path} is called with has the tokens of what it gives: your class cannot do without it; save the "
            "program as .pt2"
        )
    return standing(path, Zeros(out.shape[-1]), call, tokens)


def _has_tokens_of(given: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether both are rows of numbers, as many rows: in a map of channels the last size is none of the model's."""
    return 0 < out.dim() <= 3 and given.shape[:-1] == out.shape[:-1] and given.dtype == out.dtype


def _gives_back(module: nn.Module, call: Call) -> bool:
    """Whether a module gives back what it is given once all its parameters are 0: it adds what it computes to that."""
    bare = copy.deepcopy(module).eval()
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.zero_()
        args, kwargs = call.arguments
        found = next(t for _, t in tensors(bare(*args, **kwargs)))
    return any(found.shape == t.shape and torch.equal(found, t) for _, t in tensors(call.arguments))


def cached_difference(program: Program, model: nn.Module, made: nn.Module) -> str:
    """In words, whether a copy without some of its modules runs otherwise on the last token with a cache than without one,
    where the model does not; empty where there is no such thing, or it does not.
    """
    taken = inspect.signature(model.forward).parameters
    name = next((n for n in _STEPPED if n in program.example_kwargs), "")
    if not name or not {"past_key_values", "use_cache"} <= taken.keys() or program.example_kwargs[name].shape[-1] < 2:
        return ""
    try:
        usual = _cached_error(model, program, name)
    except Exception:  # a model that takes no cache this way
        return ""
    try:
        found = _cached_error(made, program, name)
    except Exception as error:
        return f"with a cache it does not run: {named_line(error)}"
    return "" if found <= 10 * usual + ROUNDING else f"with a cache it is {found:.1e} off"


def _cached_error(model: nn.Module, program: Program, name: str) -> float:
    """How far the last token's outputs with a cache are from those without, relative to the largest."""
    module, ids = clone(model).eval(), program.example_kwargs[name]
    given = {n: program.example_kwargs[n] for n in _STEPPED if n in program.example_kwargs}
    with torch.no_grad():
        whole = module(**given, use_cache=False)[0][:, -1]
        cache = module(**{**given, name: ids[:, :-1]}, use_cache=True).past_key_values
        last = module(**{**given, name: ids[:, -1:]}, past_key_values=cache, use_cache=True)[0][:, -1]
    return float((whole - last).abs().max() / whole.abs().max())
