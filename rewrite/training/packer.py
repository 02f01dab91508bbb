"""Packs what autograd keeps during a forward: floating tensors in groups, masks in one bit, each storage once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .chain import Outer
from .draws import peek
from .float8 import Floats, floats, from_floats
from .groups import Groups, Pair, as_pair, quantized, restored
from .heads import ByHead, by_head, from_heads, head_order
from .offload import Away, Mover, returned

BITS = (8, 4, 2)
KEPT, MOVED = 0, -1
"""In the place of bits: a tensor stays as it is, or waits in the host's memory."""


class View(NamedTuple):
    """A tensor that is kept compressed: its storage as numbers, and how it lies in there."""

    storage: Groups | Pair | Floats | ByHead | Away
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


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


class Packer:
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
        order = head_order(tensor, flat.numel(), self.value["heads"]) if "heads" in self.value else None
        if order is None:
            return quantized(flat, self._bits(), group, generator)
        rows = by_head(tensor, self.value["heads"]).permute(order)
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
        flat = from_heads(storage) if isinstance(storage, ByHead) else returned(storage)
    else:
        flat = from_floats(storage) if isinstance(storage, Floats) else restored(storage)
    flat = flat.bool() if kept.dtype is torch.bool else flat
    return flat.as_strided(kept.size, kept.stride, kept.offset)


Packed = Groups | Pair | Floats | ByHead | Away
Key = tuple[int, int, torch.dtype]
