"""Tracing a model's code along the path that it takes when it runs eagerly.

Libraries take another path when they see themselves compiled or exported: transformers then builds explicit masks and
repeats keys where eager attention is causal and grouped. The function is the same, the kernels, their rounding and their
speed are not the user's.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rewrite.torch_private import FakeTensor, fake_tensors, plain_tensors, pytree, torch_c


class View(enum.Enum):
    """What the model's code sees of being traced."""

    EAGER = "an eager run on ordinary tensors"
    FAKE = "an eager run on fake tensors"
    TRACED = "the trace"


class _OrdinaryTensor:
    """What code outside of torch finds where FakeTensor was: no tensor is an instance of it."""


@contextlib.contextmanager
def seen_as(view: View) -> Iterator[None]:
    """Let library code that asks whether it is compiled, exported or given fake tensors see ``view``; torch sees all."""
    with contextlib.ExitStack() as stack:
        for name in ("is_compiling", "is_exporting") if view is not View.TRACED else ():
            stack.enter_context(mock.patch.object(torch.compiler, name, return_value=False))
        if view is View.EAGER:
            stack.enter_context(_hidden_fakes())
        yield


@contextlib.contextmanager
def _hidden_fakes() -> Iterator[None]:
    package = fake_tensors

    def find(name: str) -> Any:
        if name != "FakeTensor":
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        return FakeTensor if caller.partition(".")[0] == "torch" else _OrdinaryTensor

    with mock.patch.object(package, "FakeTensor"), mock.patch.object(package, "__getattr__", find, create=True):
        del package.FakeTensor  # from here on find() answers; the outer patch puts it back
        yield


#: Functions that make a tensor from sizes and constants alone.
_FACTORIES = frozenset({torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.eye, torch.linspace})
#: Questions to a tensor whose answer is a Python value.
_QUESTIONS = frozenset(
    {
        Tensor.__bool__,
        Tensor.item,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.tolist,
        torch.equal,
        Tensor.equal,
        torch.allclose,
        Tensor.allclose,
    }
)
#: Added to the example's sizes to see whether an answer depends on them.
_OTHER_SIZES = (0, 1, 5, 18)


@dataclass(frozen=True)
class _Call:
    """How a tensor came about."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _UndecidedError(Exception):
    """The answer depends on more than sizes, or is not the same for all sizes."""


class SizeDecisions(TorchFunctionMode):
    """Answers a branch on tensors that follow from sizes alone (``positions.diff() != 1``) by computing it.

    A trace has no values, so such a branch would stop it. The answer is used if it is the same for several sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, tuple[Tensor, _Call]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = _Call(func, args, _said(kwargs or {}))
        tensors = [v for v in pytree.tree_leaves((args, dict(call.kwargs))) if isinstance(v, Tensor)]
        known = all(id(t) in self._calls for t in tensors) and bool(tensors or func in _FACTORIES)
        if known and func in _QUESTIONS:
            with contextlib.suppress(_UndecidedError):
                return self._decide(call)
        result = func(*args, **call.kwargs)
        if _writes(func, call.kwargs):
            if any(id(t) in self._calls for t in tensors):
                self._calls.clear()  # views of what was written cannot be told from the rest
        elif known and isinstance(result, Tensor):
            self._calls[id(result)] = (result, call)
        return result

    def _decide(self, call: _Call) -> Any:
        answers = []
        with torch.random.fork_rng(devices=[]), _no_modes():
            state = torch.random.get_rng_state()
            for more in _OTHER_SIZES:
                try:
                    answers.append(self._value(call, more, {}))
                except Exception as error:
                    raise _UndecidedError from error
            drawn = not torch.equal(state, torch.random.get_rng_state())
        if drawn or any(answer != answers[0] for answer in answers[1:]):
            raise _UndecidedError
        return answers[0]

    def _value(self, call: _Call, more: int, done: dict[int, Tensor]) -> Any:
        def concrete(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) not in done:
                    done[id(value)] = self._value(self._calls[id(value)][1], more, done)
                return done[id(value)]
            if isinstance(value, torch.SymInt):
                return _size(value, more)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        args, kwargs = pytree.tree_map(concrete, (call.args, dict(call.kwargs)))
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = "cpu"
        return call.function(*args, **kwargs)


def _said(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keywords without `generator=None`: it says nothing, and picks an overload that takes no dynamic sizes."""
    return {name: value for name, value in kwargs.items() if name != "generator" or value is not None}


def _size(size: torch.SymInt, more: int) -> int:
    """A symbolic size at the example's sizes, each enlarged by ``more``."""
    environment = size.node.shape_env
    symbols = size.node.expr.free_symbols
    hints = {s: environment.size_hint(s) for s in symbols}
    return int(size.node.expr.xreplace({s: hint + more for s, hint in hints.items()}))


def _writes(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in {"__invert__", "__index__", "__int__"}
    return in_place or operator or name in {"__setitem__", "__set__"} or kwargs.get("out") is not None


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Plain tensors and kernels inside a trace."""
    with torch_c.DisableTorchFunction(), plain_tensors():
        yield
