"""Tensors that may be shared because nothing writes into them: who tries is stopped before the first byte changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.torch_private import TorchDispatchMode


class WrittenInPlaceError(RewriteError):
    """An operator was about to write into a tensor that is shared."""


class ReadOnly(TorchDispatchMode):
    """Raises ``WrittenInPlaceError`` when an operator is about to write into the memory of one of ``tensors``."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.memory = {place for tensor in tensors if (place := _memory(tensor))}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for value in _written(func, args, kwargs):
                if _memory(value) in self.memory:
                    raise WrittenInPlaceError(
                        f"{func} writes into a tensor of shape {tuple(value.shape)} that is not its own"
                    )
        return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> Iterable[torch.Tensor]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor's bytes lie; 0 for one that has none: on the meta device, fake, sparse, empty."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()


def sharing(module: nn.Module) -> dict[int, Any]:
    """For deepcopy: the module's parameters as parameters of their own that share its memory; the rest is copied."""
    return {id(p): _shared(p) for p in module.parameters() if type(p) is nn.Parameter}


def _shared(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), parameter.requires_grad)


def fingerprint(tensors: Iterable[torch.Tensor]) -> bytes:
    """A digest of the bytes of some tensors that changes with nearly every write; it reads each twice and copies none.

    The bytes of a tensor are laid out as a square of 64-bit words, whose rows and columns are summed up: one write changes a
    sum, and so do two numbers that change places. It is no defense against one who looks for a collision.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"" if _memory(tensor) == 0 else _sums(tensor.detach()))
    return digest.digest()


def _sums(tensor: torch.Tensor) -> bytes:
    plain = tensor.int_repr() if tensor.is_quantized else tensor
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    flat = plain.contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # a view by words has to begin at a word
    flat = flat.view(torch.uint8)
    side = math.isqrt(len(flat) // 8)
    square = flat[: 8 * side * side].view(torch.int64).reshape(side, side)
    parts = (square.sum(0), square.sum(1), flat[8 * side * side :])
    return b"".join(part.cpu().numpy().tobytes() for part in parts)
