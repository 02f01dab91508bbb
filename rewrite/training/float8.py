"""Numbers in groups as 8-bit floats: x / scale in e4m3, scale = max |x| / 448 for each group.

Rounded to nearest, or at random with the mean x: ⌊x / s + u⌋ s for the spacing s of e4m3 at x and u from [0, 1).

Source: Xi et al., "COAT: Compressing Optimizer States and Activation for Memory-Efficient FP8 Training", ICLR 2025
(arXiv 2410.19313), which has groups of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .groups import Draw, drawn_by, in_rows, side_dtype

_MOST, _LEAST_EXPONENT, _MANTISSA = 448.0, -6, 3


class Floats(NamedTuple):
    """``length`` numbers of dtype ``dtype``: e4m3 rows [groups, group], scale [groups]."""

    rows: torch.Tensor
    scale: torch.Tensor
    length: int
    dtype: torch.dtype


def float_bytes(count: int, group: int, dtype: torch.dtype) -> int:
    """The bytes of ``count`` numbers in groups."""
    return -(-count // group) * (group + side_dtype(dtype).itemsize)


def floats(flat: torch.Tensor, group: int, generator: torch.Generator | None) -> Floats | None:
    """The numbers in groups; rounded at random where there is a ``generator``. None where one is infinite or NaN."""
    found = floated(flat, group, drawn_by(generator))
    return found if bool(found.scale.isfinite().all()) else None


def floated(flat: torch.Tensor, group: int, draw: Draw | None) -> Floats:
    """The numbers in groups, in operators that can be traced; ``draw`` gives u, else it is rounded to nearest."""
    rows = in_rows(flat, group)
    scale = (rows.abs().amax(1) / _MOST).to(side_dtype(flat.dtype))
    place = rows / torch.where(scale == 0, 1, scale).to(rows.dtype)[:, None]
    if draw is not None:
        exponent = torch.frexp(place).exponent.sub_(1).clamp_(min=_LEAST_EXPONENT).sub_(_MANTISSA)
        place = torch.ldexp(torch.ldexp(place, -exponent).add_(draw(rows)).floor_(), exponent)
    return Floats(place.clamp_(-_MOST, _MOST).to(torch.float8_e4m3fn), scale, flat.numel(), flat.dtype)


def from_floats(kept: Floats) -> torch.Tensor:
    """The numbers, flat."""
    wide = torch.float64 if kept.dtype is torch.float64 else torch.float32
    rows = kept.rows.to(wide) * kept.scale.to(wide)[:, None]
    return rows.view(-1)[: kept.length].to(kept.dtype)
