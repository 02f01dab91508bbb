"""Branches of a model's code that ask a tensor for its value, of which a trace has none.

An answer that follows from sizes alone (``positions.diff() != 1``) is computed for several sizes and used if it is the same
for all. One that follows from what is no measurement as well (an attention mask with or without padding, integers in
buffers) is computed on the example inputs, and the graph gets an assertion that other inputs decide alike. What a floating
tensor decides is not answered: it would hold for the example alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from rewrite.torch_private import ASSERTION, FakeTensor, assert_true, memory_of, plain_tensors, pytree, torch_c

from .refusals import model_line_of

#: Functions that make a tensor from sizes and constants alone.
_FACTORIES = frozenset({torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.eye, torch.linspace})
#: Questions to a tensor whose answer is a Python value.
_QUESTIONS = frozenset(
    {
        Tensor.__bool__,
        Tensor.__index__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.item,
        Tensor.tolist,
        torch.equal,
        Tensor.equal,
        torch.allclose,
        Tensor.allclose,
    }
)
#: Those with a plain answer to one tensor, which an assertion can hold.
_HELD = frozenset({Tensor.__bool__, Tensor.__index__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist})
#: Functions that take sizes; where those are tensors, the values are asked for inside, where nobody answers.
_SIZED = frozenset(
    {"arange", "empty", "expand", "full", "interpolate", "narrow", "new_empty", "new_full", "new_ones", "new_zeros", "ones"}
    | {"pad", "rand", "randn", "repeat", "reshape", "roll", "split", "unflatten", "view", "zeros"}
)
_INDICES = (slice, list, tuple)
_INDEXED = frozenset({Tensor.__getitem__, Tensor.__setitem__})
#: Added to the example's sizes to see whether an answer depends on them.
_OTHER_SIZES = (0, 1, 5, 18)
#: How the message of an assertion on a decision starts.
_DECIDED = "captured for inputs that decide as the example inputs do"
#: Such a message stands in files, where a text holds no quotes, escapes or brackets.
_PLAIN = str.maketrans(dict.fromkeys("'\"\\`{}()", " "))


@dataclass(frozen=True, eq=False)
class _Call:
    """How a tensor came about: in the arguments calls stand for tensors. ``data``: values of inputs or buffers went in."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    data: bool = False


class _UndecidedError(Exception):
    """The answer depends on more than is known, or is not the same for all sizes."""


@dataclass
class Known:
    """The values that decisions may rest on, where they are integers or bools: buffers by name, the inputs' leaves in order.

    ``answering``: whether such decisions are made; ``asked`` tells whether one would have been.
    """

    buffers: Mapping[str, Tensor]
    leaves: Sequence[Any]
    answering: bool = False
    asked: bool = False

    def paired(self, model: nn.Module, args: Any, kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        """The tensors of a trace with the values that they stand for."""
        traced = dict(model.named_buffers(remove_duplicate=False))
        pairs = [(traced[name], value) for name, value in self.buffers.items() if name in traced]
        leaves = pytree.tree_leaves((args, kwargs))
        if len(leaves) == len(self.leaves):
            pairs += zip(leaves, self.leaves, strict=True)
        return [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and _is_telling(b)]


def _is_telling(value: Tensor) -> bool:
    return not (value.is_meta or isinstance(value, FakeTensor) or value.is_floating_point() or value.is_complex())


def known_values(model: nn.Module, args: Any, kwargs: Any) -> Known:
    """What is known before a trace: the buffers of ``model`` and these inputs."""
    return Known(dict(model.named_buffers(remove_duplicate=False)), pytree.tree_leaves((args, kwargs)))


class Decisions(TorchFunctionMode):
    """Answers questions to tensors that follow from sizes, and, where ``known`` says so, from inputs and buffers."""

    def __init__(self, known: Known, pairs: Collection[tuple[Tensor, Tensor]], notes: list[str]) -> None:
        super().__init__()
        self._known = known
        self._notes = notes
        self._calls: dict[int, tuple[Tensor, _Call]] = {}  # by id; the tensor is kept, so that its id stays its own
        for traced, value in pairs:
            self._calls[id(traced)] = traced, _Call(_given(value), data=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__iter__ and args[0].dim():
            return iter(self.__torch_function__(torch.unbind, types, args))
        args, given = self._with_numbers(func, args, _said(kwargs or {}))
        call = self._call(func, args, given)
        if call is not None and func in _QUESTIONS:
            with contextlib.suppress(_UndecidedError):
                return self._answer(call, args[0])
        if not _writes(func, given):
            result = func(*args, **given)
            if call is not None:
                self._calls.update({id(part): (part, _part_of(call, place)) for place, part in _parts(result)})
            return result
        written = [v for v in pytree.tree_leaves((args[:1], given.get("out"))) if isinstance(v, Tensor)]
        result = func(*args, **given)
        self._forget(written)
        if call is not None and given.get("out") is None and args[0].dim():
            self._calls[id(args[0])] = args[0], replace(call, function=_written(func))
        return result

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call | None:
        """A call on what is known; None if anything else goes in."""
        tensors = [v for v in pytree.tree_leaves((args, dict(kwargs))) if isinstance(v, Tensor)]
        if not all(id(t) in self._calls for t in tensors) or not (tensors or func in _FACTORIES):
            return None

        def known(value: Any) -> Any:
            return self._calls[id(value)][1] if isinstance(value, Tensor) else value

        inner, named = pytree.tree_map(known, (args, dict(kwargs)))
        return _Call(func, inner, named, any(self._calls[id(t)][1].data for t in tensors))

    def _with_numbers(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments, with the tensors that stand for sizes replaced by their values where these can be told."""
        if func not in _INDEXED and getattr(func, "__name__", "") not in _SIZED:
            return args, kwargs

        def number(value: Any) -> Any:
            if isinstance(value, slice):
                return slice(number(value.start), number(value.stop), number(value.step))
            if isinstance(value, Tensor) and not value.dim() and not value.is_floating_point():
                call = self._call(Tensor.__index__, (value,), {})
                with contextlib.suppress(_UndecidedError):
                    return value if call is None else self._answer(call, value)
            return value

        if func in _INDEXED:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(pytree.tree_map(number, place) if isinstance(place, _INDICES) else place for place in places)
            return (args[0], places if isinstance(args[1], tuple) else places[0], *args[2:]), kwargs
        first = args[:1] if args and isinstance(args[0], Tensor) and args[0].dim() else ()
        rest = pytree.tree_map(number, args[len(first) :])
        return (*first, *rest), {k: v if k == "input" else pytree.tree_map(number, v) for k, v in kwargs.items()}

    def _forget(self, written: Sequence[Tensor]) -> None:
        """Nothing is known any more of what shares memory with a tensor that was written to."""
        places = {memory_of(tensor) for tensor in written}
        self._calls = {key: entry for key, entry in self._calls.items() if memory_of(entry[0]) not in places}

    def _answer(self, call: _Call, tensor: Any) -> Any:
        return self._by_data(call, tensor) if call.data else self._by_sizes(call)

    def _by_sizes(self, call: _Call) -> Any:
        answers = self._answers(call, _OTHER_SIZES)
        if any(answer != answers[0] for answer in answers[1:]):
            raise _UndecidedError
        return answers[0]

    def _by_data(self, call: _Call, tensor: Any) -> Any:
        """The answer for the example inputs, which an assertion in the graph demands of others."""
        if call.function not in _HELD or not isinstance(tensor, Tensor):
            raise _UndecidedError
        self._known.asked = True
        if not self._known.answering:
            raise _UndecidedError
        (answer,) = self._answers(call, (0,))
        place, code = model_line_of(sys._getframe(3))
        message = f"{_DECIDED}: {_shown(answer)} at {place}; capture the model with inputs like these"
        assert_true(_alike(tensor, answer), message.translate(_PLAIN))
        note = f"the inputs' values decide, the example's are taken and asserted: {_shown(answer)} at {place}: {code}"
        if note not in self._notes:
            self._notes.append(note)
        return answer

    def _answers(self, call: _Call, sizes: Sequence[int]) -> list[Any]:
        answers = []
        with torch.random.fork_rng(devices=[]), _no_modes():
            state = torch.random.get_rng_state()
            for more in sizes:
                try:
                    answers.append(_value(call, more, {}))
                except Exception as error:
                    raise _UndecidedError from error
            if not torch.equal(state, torch.random.get_rng_state()):
                raise _UndecidedError
        return answers


def _value(call: _Call, more: int, done: dict[_Call, Any]) -> Any:
    """What a call gives on the CPU, for the example's sizes enlarged by ``more``."""
    if call in done:
        return done[call]

    def concrete(value: Any) -> Any:
        if isinstance(value, _Call):
            return _value(value, more, done)
        if isinstance(value, torch.SymInt):
            return _size(value, more)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args, kwargs = pytree.tree_map(concrete, (call.args, dict(call.kwargs)))
    if isinstance(kwargs.get("device"), str):
        kwargs["device"] = "cpu"
    done[call] = call.function(*args, **kwargs)
    return done[call]


def _given(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value.detach().cpu()


def _written(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the first argument holds after ``function`` has written to it."""

    def write(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = target.clone()
        function(copy, *args, **kwargs)
        return copy

    return write


def is_decision(node: Node) -> bool:
    """Whether a node asserts that inputs decide as the example inputs did."""
    return node.target is ASSERTION and str(node.args[1]).startswith(_DECIDED)


def _parts(result: Any) -> list[tuple[int | None, Tensor]]:
    """The tensors of a result with their places, None for the result itself."""
    if isinstance(result, Tensor):
        return [(None, result)]
    if isinstance(result, (tuple, list)):
        return [(i, part) for i, part in enumerate(result) if isinstance(part, Tensor)]
    return []


def _part_of(call: _Call, place: int | None) -> _Call:
    return call if place is None else _Call(lambda whole: whole[place], (call,), {}, call.data)


def _alike(tensor: Tensor, answer: Any) -> Tensor:
    """One bool: whether a tensor holds this answer."""
    if isinstance(answer, list):
        return torch.eq(tensor, torch.tensor(answer, dtype=tensor.dtype, device=tensor.device)).all()
    single = tensor.reshape(())
    if isinstance(answer, bool):  # which may be asked of a number
        return single != 0 if answer else single == 0
    return torch.eq(single, answer)


def _shown(answer: Any) -> str:
    text = str(answer)
    return text if len(text) <= 40 else f"{text[:37]}..."


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
