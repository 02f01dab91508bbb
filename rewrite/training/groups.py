"""Numbers in groups, quantized: what autograd keeps as whole numbers of 8, 4 or 2 bits with a minimum and a scale a group.

q = ⌊(x - min) / scale + u⌋ clamped to [0, 2^b - 1], scale = (max - min) / (2^b - 1), u = ½ or drawn from [0, 1), and back
min + scale · q. With u drawn the mean over draws is x. Where min is 0, as behind a ReLU, q is at least 1 for x > 0: its
gradient asks which numbers are above 0, and an error of less than one step is less than that of a wrong answer.

Source: Liu et al., "GACT: Activation Compressed Training for Generic Network Architectures", ICML 2022 (arXiv 2206.11357).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from .packing import pack, unpack

Draw = Callable[[torch.Tensor], torch.Tensor]
"""Gives for rows of numbers as many from [0, 1)."""


class Groups(NamedTuple):
    """``length`` numbers of dtype ``dtype``: packed rows [groups, group · bits / 8], minimum and scale [groups]."""

    rows: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    length: int
    bits: int
    dtype: torch.dtype


class Pair(NamedTuple):
    """``length`` numbers that are ``low`` or ``high``, one bit each."""

    planes: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    length: int


def grouped_bytes(count: int, bits: int, group: int, dtype: torch.dtype) -> int:
    """The bytes of ``count`` numbers in groups."""
    groups = -(-count // group)
    return groups * (group * bits // 8 + 2 * side_dtype(dtype).itemsize)


def side_dtype(dtype: torch.dtype) -> torch.dtype:
    """What minimum and scale are kept in: float32, or bfloat16 for numbers that are no wider."""
    return torch.float32 if dtype.itemsize > 2 else torch.bfloat16


def as_pair(flat: torch.Tensor) -> Pair | None:
    """The numbers as one bit each where there are at most two of them, as a mask has; else None. NaN is none of them."""
    if not flat.numel():
        return None
    low, high = flat.aminmax()
    is_high = flat == high
    if not bool((is_high | (flat == low)).all()):
        return None
    return Pair(pack(is_high.view(torch.uint8), 1), low, high, flat.numel())


def quantized(flat: torch.Tensor, bits: int, group: int, generator: torch.Generator | None) -> Groups | None:
    """The numbers in groups; rounded at random where there is a ``generator``. None where one is infinite or NaN."""
    found = grouped(flat, bits, group, drawn_by(generator))
    return found if bool((found.low + found.scale).isfinite().all()) else None


def drawn_by(generator: torch.Generator | None) -> Draw | None:
    """Draws u for each number from a generator."""
    if generator is None:
        return None
    return lambda rows: torch.rand(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)


def grouped(flat: torch.Tensor, bits: int, group: int, draw: Draw | None) -> Groups:
    """The numbers in groups, in operators that can be traced; ``draw`` gives u, else it is ½. What is not finite is lost."""
    kept = side_dtype(flat.dtype)
    rows = in_rows(flat, group)
    least, most = rows.aminmax(dim=1)
    top = 2**bits - 1
    low, scale = least.to(kept), ((most - least) / top).to(kept)
    divisor = torch.where(scale == 0, 1, scale).to(rows.dtype)
    place = (rows - low.to(rows.dtype)[:, None]) / divisor[:, None]
    place += 0.5 if draw is None else draw(rows)
    from_zero = (low == 0)[:, None] & (rows > 0)  # what ReLU gives: its gradient asks which numbers are above 0
    numbers = torch.maximum(place.floor_().clamp_(0, top), from_zero.to(place.dtype)).to(torch.uint8)
    return Groups(_joined(numbers, bits), low, scale, flat.numel(), bits, flat.dtype)


def in_rows(flat: torch.Tensor, group: int) -> torch.Tensor:
    """Numbers as groups [groups, group], filled up with 0, in the dtype that they are rounded in."""
    wide = torch.float64 if flat.dtype is torch.float64 else torch.float32
    return F.pad(flat, (0, -flat.numel() % group)).view(-1, group).to(wide)


def restored(kept: Groups | Pair) -> torch.Tensor:
    """The numbers, flat."""
    if isinstance(kept, Pair):
        return torch.where(unpack(kept.planes, kept.length).bool(), kept.high, kept.low)
    numbers = _parted(kept.rows, kept.bits)
    wide = torch.float32 if kept.dtype.itemsize <= 2 else kept.dtype
    rows = numbers.to(wide) * kept.scale.to(wide)[:, None] + kept.low.to(wide)[:, None]
    return rows.view(-1)[: kept.length].to(kept.dtype)


def _joined(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Several numbers of a row to the byte: the k-th part of the row stands k · bits higher."""
    parts = numbers.chunk(8 // bits, dim=1)
    made = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        made |= part << (bits * place)
    return made


def _parted(rows: torch.Tensor, bits: int) -> torch.Tensor:
    top = 2**bits - 1
    return torch.cat([(rows >> (bits * place)) & top for place in range(8 // bits)], dim=1)
