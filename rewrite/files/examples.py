"""Example inputs as torch.save writes them, and read back without unpickling: the opcodes are followed as data.

What is made are tensors, plain values, tuples, lists and dicts, and nothing else can be.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.sources.pickle_scan import Global, Node, UnreadableError, scan

from .archive import Archive
from .checked import DIMENSIONS, shown

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_REBUILD = "torch._utils._rebuild_"
_VALUES = 200_000
_EXPANDED = 1 << 28
_DEPTH = 50

Call = tuple[tuple[Any, ...], dict[str, Any]]


def write_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """The inputs as bytes. Raises RewriteError where they hold what ``read_examples`` would not make."""
    buffer = io.BytesIO()
    try:
        torch.save((args, dict(kwargs)), buffer)
        read_examples(buffer.getvalue())
    except Exception:  # a class of the user's may refuse to be pickled in its own way
        raise RewriteError("the example inputs hold objects that a file cannot: capture with plain containers") from None
    return buffer.getvalue()


def read_examples(content: bytes) -> Call:
    """The pair (args, kwargs). Raises RewriteError for damage, and for anything but tensors and plain values."""
    archive = Archive(io.BytesIO(content))
    if archive.entries.get("byteorder") is not None and archive.read("byteorder") != b"little":
        raise RewriteError("its example inputs are of a machine with another order of bytes")
    try:
        found = scan(archive.read("data.pkl"))
    except UnreadableError as error:
        raise RewriteError(f"its example inputs cannot be read: {error}") from None
    made = _Reader(archive).make(found.root, 0)
    fits = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], tuple) and isinstance(made[1], dict)
    if not fits or not all(isinstance(key, str) for key in made[1]):
        raise RewriteError("its example inputs are no arguments of a call")
    return made[0], made[1]


class _Reader:
    """Makes values from the nodes of a scanned pickle, at most so many and so deep."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._left = _VALUES
        self._tensors: dict[int, torch.Tensor] = {}

    def make(self, node: Any, depth: int) -> Any:
        self._left -= 1
        if depth > _DEPTH or self._left < 0:
            raise RewriteError("its example inputs hold more than any program's")
        if isinstance(node, Global):
            return _dtype(node)
        if not isinstance(node, Node):
            return node
        if node.states:
            raise RewriteError("its example inputs hold an object that is no tensor and no plain value")
        if node.is_mapping:
            values = [self.make(value, depth + 1) for value in node.entries]
            return _dictionary(values)
        if node.kind in ("list", "tuple"):
            made = [self.make(value, depth + 1) for value in (node.entries if node.kind == "list" else node.items)]
            return made if node.kind == "list" else tuple(made)
        if node.kind == "call":
            return self._called(node, depth)
        raise RewriteError(f"its example inputs hold a {node.callee or node.kind}, which is no plain value")

    def _called(self, node: Node, depth: int) -> Any:
        if node.callee == "torch.device" and len(node.items) == 1 and node.items[0] in ("cpu", "meta"):
            return torch.device(node.items[0])
        if node.callee == "torch.Size" and len(node.items) == 1:
            return torch.Size(_sizes(node.items[0], "sizes"))
        if id(node) not in self._tensors:
            self._tensors[id(node)] = self._tensor(node)
        return self._tensors[id(node)]

    def _tensor(self, node: Node) -> torch.Tensor:
        kind, items = node.callee.removeprefix(_REBUILD), node.items
        if node.callee == f"{_REBUILD}{kind}":
            if kind in ("tensor_v2", "tensor_v3") and len(items) >= 6:
                return self._dense(items, _dtype(items[6]) if kind == "tensor_v3" and len(items) > 6 else None)
            if kind == "meta_tensor_no_storage" and len(items) == 4:
                sizes = _sizes(items[1], "sizes")
                return torch.empty_strided(sizes, _sizes(items[2], "strides"), dtype=_dtype(items[0]), device="meta")
            if kind == "parameter" and len(items) == 3 and isinstance(items[0], Node) and isinstance(items[1], bool):
                return torch.nn.Parameter(self._tensor(items[0]), items[1])
        raise RewriteError(f"its example inputs hold a {node.callee or 'computed value'}, which is no plain tensor")

    def _dense(self, items: tuple[Any, ...], dtype: torch.dtype | None) -> torch.Tensor:
        """A tensor over its storage's bytes; the sizes and strides must stay within them."""
        storage, offset, sizes, strides = items[0], items[1], _sizes(items[2], "sizes"), _sizes(items[3], "strides")
        if not isinstance(storage, Node) or storage.kind != "storage" or len(storage.items) < 5:
            raise RewriteError("its example inputs hold a tensor without a storage")
        named = storage.items[1].name if isinstance(storage.items[1], Global) else ""
        dtype = dtype or _DTYPES.get(named)
        if dtype is None or len(strides) != len(sizes) or type(offset) is not int or offset < 0:
            raise RewriteError(f"its example inputs hold a tensor that is made of {shown(named)}")
        entry = f"data/{storage.items[2]}"
        held = self._archive.size(entry)
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1 if math.prod(sizes) else 0
        if last * dtype.itemsize > held or math.prod(sizes) * dtype.itemsize > max(held, _EXPANDED):
            raise RewriteError(f"its example inputs hold a tensor of sizes {shown(sizes)} on {held} bytes")
        content = bytearray(self._archive.read(entry))[: held // dtype.itemsize * dtype.itemsize]
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.as_strided(sizes, strides, offset).clone().requires_grad_(items[4] is True)


def _dictionary(values: list[Any]) -> dict[Any, Any]:
    if not all(isinstance(key, str | int) for key in values[::2]):
        raise RewriteError("its example inputs hold a dict whose keys are no plain values")
    return dict(zip(values[::2], values[1::2], strict=True))


def _dtype(node: Any) -> torch.dtype:
    found = getattr(torch, node.name, None) if isinstance(node, Global) and node.module == "torch" else None
    if not isinstance(found, torch.dtype):
        raise RewriteError(f"its example inputs hold a {shown(getattr(node, 'path', node))}, which is no plain value")
    return found


def _sizes(node: Any, what: str) -> list[int]:
    values = node.items[0] if isinstance(node, Node) and node.callee == "torch.Size" and node.items else node
    held = list(values.items) if isinstance(values, Node) and values.kind == "tuple" else None
    if held is None or len(held) > DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 62 for n in held):
        raise RewriteError(f"its example inputs hold a tensor whose {what} are no numbers")
    return held
