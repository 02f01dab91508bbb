"""The property ``saved_tensors``: what autograd keeps during a forward is kept compressed, each storage once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rewrite.errors import RewriteError
from rewrite.graph.properties import Property

from .chain import Outer
from .draws import move_on, peek
from .float8 import Floats, floats, from_floats
from .groups import Groups, Pair, as_pair, quantized, restored
from .offload import Away, Mover, returned

BITS, ROUNDINGS, FORMATS = (8, 4, 2), ("stochastic", "nearest"), ("int", "fp8")
KEPT, MOVED = 0, -1
"""In the place of bits: a tensor stays as it is, or waits in the host's memory."""
_WANTED, _MORE = {"bits", "group", "rounding", "min_size"}, {"heads", "format"}


class View(NamedTuple):
    """A tensor that is kept compressed: its storage as numbers, and how it lies in there."""

    storage: Groups | Pair | Floats | ByHead | Away
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class ByHead(NamedTuple):
    """A whole storage whose groups are heads or channels: the numbers in that order, and the layout that they go back to."""

    numbers: Groups
    order: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]


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
    the host, those beyond have 8."""
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
    packer = _Packer(Storages.of(module, inputs), value)
    with saved_tensors_hooks(packer.pack, packer.unpack):
        yield
    if packer.generators:
        move_on()


SAVED_TENSORS = Property(around, check, rank=1)


@dataclass(frozen=True)
class Storages:
    """Which storages count: those of plain tensors of floating numbers or booleans that are not ``owned``."""

    owned: frozenset[int]

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[torch.Tensor]) -> Storages:
        """Parameters, buffers and inputs are left aside."""
        held = [*module.parameters(), *module.buffers(), *inputs]
        return cls(frozenset(t.untyped_storage().data_ptr() for t in held))

    def key(self, tensor: torch.Tensor) -> Key | None:
        """The same for the same numbers in the same memory, while that is held; None where it does not count."""
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if not plain or not (tensor.is_floating_point() or tensor.dtype is torch.bool):
            return None
        address = tensor.untyped_storage().data_ptr()
        return None if address in self.owned else (address, tensor._version, tensor.dtype)


def flat_storage(tensor: torch.Tensor) -> torch.Tensor:
    """All numbers of a tensor's storage, as they lie."""
    return tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


class _Packer:
    """Compresses the storages of one forward, each once: a weak reference tells it from what takes its place in memory."""

    def __init__(self, storages: Storages, value: Mapping[str, Any]) -> None:
        self.storages, self.value = storages, value
        self.outer = Outer()
        self.known: dict[Key, tuple[StorageWeakRef, Packed | None]] = {}
        self.generators: dict[torch.device, torch.Generator] = {}
        self.count = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        key = self.storages.key(tensor)
        if key is None:
            return self.outer.pack(tensor)
        if key not in self.known or self.known[key][0].expired():
            self.known[key] = (StorageWeakRef(tensor.untyped_storage()), self._compressed(tensor.detach()))
        found = self.known[key][1]
        if found is None:
            return self.outer.pack(tensor)
        return View(found, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Any) -> torch.Tensor:
        return unpacked(kept) if isinstance(kept, View) else self.outer.unpack(kept)

    def _compressed(self, tensor: torch.Tensor) -> Packed | None:
        """The storage of a tensor as it is kept."""
        flat = flat_storage(tensor)
        is_small = flat.numel() < self.value["min_size"]
        if is_small and type(self.value["bits"]) is int:
            return None
        pair = as_pair(flat.view(torch.uint8) if flat.dtype is torch.bool else flat)
        if pair is not None or flat.dtype is torch.bool:
            return None if is_small else pair
        self.count += 1
        if is_small:
            return None
        if self._bits() in (KEPT, MOVED):
            return Mover(frozenset(), 1).moved(flat) if self._bits() == MOVED else None
        generator, group = self._generator(flat.device), self.value["group"]
        if self.value.get("format") == "fp8":
            return floats(flat, group, generator)
        order = _head_order(tensor, flat.numel(), self.value["heads"]) if "heads" in self.value else None
        if order is None:
            return quantized(flat, self._bits(), group, generator)
        rows = _by_head(tensor, self.value["heads"]).permute(order)
        numbers = quantized(rows.reshape(-1), self._bits(), rows[0].numel(), generator)
        whole = (tuple(tensor.shape), tensor.stride())
        return None if numbers is None else ByHead(numbers, order, *whole)

    def _bits(self) -> int:
        """The bits of the tensor that is the ``count``-th to be compressed."""
        bits = self.value["bits"]
        if type(bits) is int:
            return bits
        found: int = bits[self.count - 1] if self.count <= len(bits) else max(BITS)
        return found

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.value["rounding"] == "nearest":
            return None
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(peek())
        return self.generators[device]


def unpacked(kept: View) -> torch.Tensor:
    """The tensor that was kept, in its layout."""
    storage = kept.storage
    if isinstance(storage, ByHead | Away):
        flat = _from_heads(storage) if isinstance(storage, ByHead) else returned(storage)
    else:
        flat = from_floats(storage) if isinstance(storage, Floats) else restored(storage)
    flat = flat.bool() if kept.dtype is torch.bool else flat
    return flat.as_strided(kept.size, kept.stride, kept.offset)


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A tensor with the axis of its groups: axis 1 of maps and of heads apart, else the last one in ``heads`` parts."""
    return tensor if tensor.dim() >= 4 else tensor.unflatten(-1, (heads, -1))


def _head_order(tensor: torch.Tensor, count: int, heads: int) -> tuple[int, ...] | None:
    """The axes of ``_by_head``, the groups' first; None where the tensor is not its whole storage, or has no such axis."""
    if tensor.numel() != count or tensor.dim() < 2 or not _is_dense(tensor):
        return None
    if tensor.dim() >= 4:
        axis, dims, groups = 1, tensor.dim(), tensor.shape[1]
    else:
        axis, dims, groups = tensor.dim() - 1, tensor.dim() + 1, heads
        if tensor.shape[-1] % heads:
            return None
    if count // groups % 8:
        return None
    return (axis, *(i for i in range(dims) if i != axis))


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the numbers lie in their storage once each, in some order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _from_heads(kept: ByHead) -> torch.Tensor:
    """The storage, flat."""
    made = torch.empty(kept.numbers.length, dtype=kept.numbers.dtype, device=kept.numbers.rows.device)
    parts = len(kept.order)
    view = made.as_strided(kept.size, kept.stride)
    view = view if parts == len(kept.size) else _by_head(view, kept.numbers.rows.shape[0])
    view = view.permute(kept.order)
    view.copy_(restored(kept.numbers).view(view.shape))
    return made


Packed = Groups | Pair | Floats | ByHead | Away
Key = tuple[int, int, torch.dtype]
