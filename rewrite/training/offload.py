"""The property ``offload``: what autograd keeps on a device waits for the backward in the host's memory."""

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


class Away(NamedTuple):
    """A tensor whose storage is in the host's memory: the device it comes from, and how it lies in there."""

    storage: torch.Tensor
    device: torch.device
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def check(value: Any) -> None:
    """Raise RewriteError for a value that ``offload`` cannot have."""
    whole = isinstance(value, Mapping) and value.keys() == {"min_size"}
    if not whole or type(value["min_size"]) is not int or value["min_size"] < 1:
        raise RewriteError("offload takes a min_size of 1 or more")


@contextmanager
def around(module: nn.Module, inputs: Sequence[torch.Tensor], value: Any) -> Iterator[None]:
    """Move what autograd saves to the host, each storage once; what is there already stays as it is.

    What parameters, buffers and inputs own, and what has fewer than ``min_size`` numbers, stays on the device. On a GPU the
    host's memory is pinned and the copies do not wait for each other.
    """
    if not torch.is_grad_enabled():
        yield
        return
    owned = frozenset(t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers(), *inputs])
    mover = Mover(owned, value["min_size"])
    with saved_tensors_hooks(mover.pack, mover.unpack):
        yield


OFFLOAD = Property(around, check)


class Mover:
    """Copies the storages of one forward, each once: a weak reference tells it from what takes its place in memory."""

    def __init__(self, owned: frozenset[int], min_size: int) -> None:
        self.owned, self.min_size = owned, min_size
        self.outer = Outer()
        self.known: dict[tuple[int, int, torch.dtype], tuple[StorageWeakRef, torch.Tensor]] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type in ("cpu", "meta"):
            return self.outer.pack(tensor)
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        if count < self.min_size or tensor.untyped_storage().data_ptr() in self.owned:
            return self.outer.pack(tensor)
        return self.moved(tensor)

    def moved(self, tensor: torch.Tensor) -> Away:
        """The tensor with its storage copied to the host."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        key = (reference.cdata, tensor._version, tensor.dtype)
        if key not in self.known:
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=tensor.device.type == "cuda")
            host.copy_(flat, non_blocking=True)
            self.known[key] = (reference, host)
        place = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        return Away(self.known[key][1], tensor.device, *place)

    def unpack(self, kept: Any) -> torch.Tensor:
        if not isinstance(kept, Away):
            return self.outer.unpack(kept)
        return returned(kept)


def returned(kept: Away) -> torch.Tensor:
    """The tensor on its device again."""
    flat = kept.storage.to(kept.device, non_blocking=True)
    return flat.as_strided(kept.size, kept.stride, kept.offset)
