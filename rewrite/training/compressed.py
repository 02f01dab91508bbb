"""The property ``saved_tensors``: what autograd keeps during a forward is kept compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rewrite.errors import RewriteError
from rewrite.graph.properties import Property

from .draws import move_on
from .inlined import hooks, packing_by, plan_of
from .packer import BITS, KEPT, MOVED, Packer, Storages

ROUNDINGS, FORMATS = ("stochastic", "nearest"), ("int", "fp8")
_WANTED, _MORE = {"bits", "group", "rounding", "min_size"}, {"heads", "format"}


def check(value: Any) -> None:
    """Raise RewriteError for a value that ``saved_tensors`` cannot have."""
    whole = isinstance(value, Mapping) and _WANTED <= value.keys() <= _WANTED | _MORE
    if not whole or not _are_bits(value["bits"]) or value["rounding"] not in ROUNDINGS:
        raise RewriteError(f"saved_tensors takes bits ({BITS}), group, rounding ({' or '.join(ROUNDINGS)}) and min_size")
    counts = (value["group"], value["min_size"], value.get("heads", 1))
    if any(type(count) is not int or not 1 <= count < 2**31 for count in counts) or value["group"] % 8:
        raise RewriteError("saved_tensors takes a group that is a multiple of 8, a min_size and heads of 1 or more")
    if value.get("format", "int") not in FORMATS:
        raise RewriteError(f"saved_tensors takes a format of {' or '.join(FORMATS)}")


def _are_bits(value: Any) -> bool:
    """A number of bits for all, or one for each tensor that is compressed, in execution order: 0 keeps it, -1 moves it to
    the host, those beyond have 8.
    """
    if type(value) is int:
        return value in BITS
    return isinstance(value, list | tuple) and all(each in (*BITS, KEPT, MOVED) for each in value)


@contextmanager
def around(module: nn.Module, inputs: Sequence[torch.Tensor], value: Any) -> Iterator[None]:
    """Keep what autograd saves compressed: floating tensors in groups, masks and booleans in one bit.

    What parameters, buffers and inputs own stays as it is, as do integers, what has fewer than ``min_size`` numbers, and
    what is not finite. Rounding draws from a generator of its own, seeded by the state of torch's, which is moved on by one
    draw after the forward: each step draws anew, and the forward draws what it would.
    """
    if not torch.is_grad_enabled():
        yield
        return
    packer = Packer(Storages.of(module, inputs), value)
    with saved_tensors_hooks(packer.pack, packer.unpack):
        yield
    if packer.generators:
        move_on()


@contextmanager
def compiled(module: nn.Module, inputs: Sequence[torch.Tensor], value: Any) -> Iterator[None]:
    """The same where the forward is compiled: packing becomes a part of the compiled graphs.

    Which tensors are kept is the compiler's choice; those that live in the graph alone are compressed. A list of bits is of
    tensors that there are not here: where it compresses any, all have 8 bits, else masks alone are packed. What a graph
    break leaves to eager mode is packed as there.
    """
    if not torch.is_grad_enabled():
        yield
        return
    plan = plan_of(value)
    with packing_by(Packer(Storages.of(module, inputs), value)), saved_tensors_hooks(*hooks(plan)):
        yield
    if plan.is_random:
        move_on()


SAVED_TENSORS = Property(around, check, rank=1, compiled=compiled)
