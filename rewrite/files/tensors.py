"""Tensors as raw bytes in an archive, and back: each is stored once, and none is larger than what the file holds of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rewrite.errors import RewriteError

from .archive import Archive, Writer
from .checked import DIMENSIONS, Json, items, path, shown, size, table, text
from .values import decode, device, encode


class TensorWriter:
    """Puts tensors into an archive, each once however many names it has."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._places: dict[Any, str] = {}
        self._counts: dict[str, int] = {}

    def add(self, tensor: torch.Tensor, prefix: str) -> str:
        """Store a tensor under ``prefix`` and the next number, unless it is there; the name of its entry.

        A tensor on the meta device has an empty entry. Raises RewriteError for one that is no plain dense tensor.
        """
        key = _key(tensor)
        if key is None or key not in self._places or not self._places[key].startswith(prefix):
            number = self._counts.get(prefix, 0)
            self._counts[prefix] = number + 1
            name = f"{prefix}{number}"
            self._writer.add(name, raw_bytes(tensor))
            if key is None:
                return name
            self._places.setdefault(key, name)
            return name
        return self._places[key]

    def find(self, tensor: torch.Tensor) -> str | None:
        """The entry that holds a tensor already."""
        key = _key(tensor)
        return None if key is None else self._places.get(key)


def _key(tensor: torch.Tensor) -> Any:
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in the order of memory, see ``dense_strides``."""
    if type(tensor.data) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        raise RewriteError(f"a {type(tensor).__name__} of layout {tensor.layout} cannot be written to a file")
    if tensor.is_meta or not tensor.numel():
        return memoryview(b"")
    order = _memory_order(tensor)
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().permute(order).contiguous()
    return buffer_of(dense)


def buffer_of(dense: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    found: Any = dense.reshape(-1).view(torch.uint8).numpy()
    return memoryview(found)


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """The axes from the slowest to the fastest, where they fill memory without gaps; else as they are."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides with which ``raw_bytes`` of a tensor are to be read: its own, where it fills memory without gaps."""
    strides, step = [0] * tensor.dim(), 1
    for axis in reversed(_memory_order(tensor)):
        strides[axis], step = step, step * max(1, tensor.shape[axis])
    return tuple(strides)


def describe(tensor: torch.Tensor, entry: str) -> Json:
    """A tensor's entry, dtype, sizes, the order of its axes in memory, and device."""
    return {
        "entry": entry,
        "dtype": encode(tensor.dtype),
        "sizes": list(tensor.shape),
        "order": _memory_order(tensor),
        "device": str(tensor.device),
    }


def read_tensors(archive: Archive, data: Json) -> dict[str, torch.Tensor]:
    """The tensors that ``describe`` listed by their paths; those of one entry and layout are one."""
    found: dict[str, torch.Tensor] = {}
    made: dict[Any, torch.Tensor] = {}
    for name, given in table(data, "tensors").items():
        entry = table(given, "tensor", "entry", "dtype", "sizes", "order", "device")
        dtype = decode(entry["dtype"])
        sizes = [size(s) for s in items(entry["sizes"], "sizes", DIMENSIONS)]
        order = items(entry["order"], "order of axes", DIMENSIONS)
        if not isinstance(dtype, torch.dtype) or sorted(map(repr, order)) != sorted(map(repr, range(len(sizes)))):
            raise RewriteError(f"its tensor {shown(name)} has no dtype or no order of axes")
        place = text(entry["entry"], "entry")
        key = (place, dtype, tuple(sizes), tuple(order))
        if key not in made:
            made[key] = _read(archive, place, dtype, sizes, order, device(entry["device"]))
        found[path(name, "tensor")] = made[key]
    return found


def _read(
    archive: Archive, entry: str, dtype: torch.dtype, sizes: Sequence[int], order: Sequence[int], home: torch.device
) -> torch.Tensor:
    if home.type == "meta":
        flat = torch.empty([sizes[axis] for axis in order], dtype=dtype, device=home)
    else:
        flat = read_dense(archive, entry, dtype, [sizes[axis] for axis in order]).to(home)
    return flat.permute([list(order).index(axis) for axis in range(len(order))])


def read_dense(archive: Archive, entry: str, dtype: torch.dtype, sizes: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor from an entry, which must have exactly its bytes: asked before anything is allocated."""
    wanted, held = math.prod(sizes) * dtype.itemsize, archive.size(entry)
    if wanted != held:
        raise RewriteError(f"its entry {shown(entry)} has {held} bytes, where a tensor of {wanted} is to be")
    made = torch.empty(list(sizes), dtype=dtype)
    if held:
        archive.read_into(entry, buffer_of(made))
    else:
        archive.read(entry)
    return made


def tied(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """The one tensor that several names share."""
    found = next((tensors[name] for name in names if name in tensors), None)
    if found is None:
        raise RewriteError(f"its tensor {shown(names)} is missing")
    return found
