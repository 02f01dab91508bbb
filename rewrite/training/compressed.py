"""The property ``saved_tensors``: what autograd keeps during a forward is kept compressed, each storage once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rewrite.errors import RewriteError
from rewrite.graph.properties import Property

from .chain import Outer
from .groups import Groups, Pair, as_pair, quantized, restored

BITS, ROUNDINGS = (8, 4, 2), ("stochastic", "nearest")


class View(NamedTuple):
    """A tensor that is kept compressed: its storage as numbers, and how it lies in there."""

    storage: Groups | Pair
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def check(value: Any) -> None:
    """Raise RewriteError for a value that ``saved_tensors`` cannot have."""
    wanted = {"bits", "group", "rounding", "min_size"}
    whole = isinstance(value, Mapping) and value.keys() == wanted
    if not whole or value["bits"] not in BITS or value["rounding"] not in ROUNDINGS:
        raise RewriteError(f"saved_tensors takes bits ({BITS}), group, rounding ({' or '.join(ROUNDINGS)}) and min_size")
    counts = (value["group"], value["min_size"])
    if any(type(count) is not int or not 1 <= count < 2**31 for count in counts) or value["group"] % 8:
        raise RewriteError("saved_tensors takes a group that is a multiple of 8, and a min_size of 1 or more")


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
    owned = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers(), *inputs]}
    packer = _Packer(owned, value)
    with saved_tensors_hooks(packer.pack, packer.unpack):
        yield
    if packer.has_drawn:
        torch.rand(())


SAVED_TENSORS = Property(around, check, rank=1)


class _Packer:
    """Compresses the storages of one forward, each once: a weak reference tells it from what takes its place in memory."""

    def __init__(self, owned: set[int], value: Mapping[str, Any]) -> None:
        self.owned, self.value = owned, value
        self.outer = Outer()
        self.known: dict[tuple[int, int, torch.dtype], tuple[StorageWeakRef, Groups | Pair | None]] = {}
        self.generators: dict[torch.device, torch.Generator] = {}

    @property
    def has_drawn(self) -> bool:
        return bool(self.generators)

    def pack(self, tensor: torch.Tensor) -> Any:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if not plain or not (tensor.is_floating_point() or tensor.dtype is torch.bool):
            return self.outer.pack(tensor)
        storage = tensor.untyped_storage()
        count = storage.nbytes() // tensor.itemsize
        if count < self.value["min_size"] or storage.data_ptr() in self.owned:
            return self.outer.pack(tensor)
        reference = StorageWeakRef(storage)
        key = (reference.cdata, tensor._version, tensor.dtype)
        if key not in self.known:
            self.known[key] = (reference, self._compressed(tensor.detach().as_strided((count,), (1,), 0)))
        found = self.known[key][1]
        if found is None:
            return self.outer.pack(tensor)
        return View(found, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Any) -> torch.Tensor:
        return unpacked(kept) if isinstance(kept, View) else self.outer.unpack(kept)

    def _compressed(self, flat: torch.Tensor) -> Groups | Pair | None:
        if flat.dtype is torch.bool:
            return as_pair(flat.view(torch.uint8))
        return as_pair(flat) or quantized(flat, self.value["bits"], self.value["group"], self._generator(flat.device))

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.value["rounding"] == "nearest":
            return None
        if device not in self.generators:
            peek = torch.Generator()
            peek.set_state(torch.get_rng_state())
            seed = int(torch.randint(2**62, (), generator=peek))
            self.generators[device] = torch.Generator(device).manual_seed(seed)
        return self.generators[device]


def unpacked(kept: View) -> torch.Tensor:
    """The tensor that was kept, in its layout."""
    flat = restored(kept.storage)
    flat = flat.bool() if kept.dtype is torch.bool else flat
    return flat.as_strided(kept.size, kept.stride, kept.offset)
