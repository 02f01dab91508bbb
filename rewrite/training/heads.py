"""Tensors whose groups are attention heads, or channels of a map, and the order in which the numbers then lie."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .groups import Groups, restored


class ByHead(NamedTuple):
    """A whole storage whose groups are heads or channels: the numbers in that order, and the layout that they go back to."""

    numbers: Groups
    order: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]


def by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A tensor with the axis of its groups: axis 1 of maps and of heads apart, else the last one in ``heads`` parts."""
    return tensor if tensor.dim() >= 4 else tensor.unflatten(-1, (heads, -1))


def head_order(tensor: torch.Tensor, count: int, heads: int) -> tuple[int, ...] | None:
    """The axes of ``by_head``, the groups' first; None where the tensor is not its whole storage, or has no such axis."""
    if tensor.numel() != count or tensor.dim() < 2 or not is_dense(tensor):
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


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the numbers lie in their storage once each, in some order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_apart(tensor: torch.Tensor) -> bool:
    """Whether no two numbers share a place in the storage, in some order of the axes; gaps do not matter."""
    least = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride < least:
            return False
        least = stride * size if size != 1 else least
    return True


def from_heads(kept: ByHead) -> torch.Tensor:
    """The storage, flat."""
    made = torch.empty(kept.numbers.length, dtype=kept.numbers.dtype, device=kept.numbers.rows.device)
    parts = len(kept.order)
    view = made.as_strided(kept.size, kept.stride)
    view = view if parts == len(kept.size) else by_head(view, kept.numbers.rows.shape[0])
    view = view.permute(kept.order)
    view.copy_(restored(kept.numbers).view(view.shape))
    return made
