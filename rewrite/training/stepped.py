"""An operator whose gradient is a step function: it keeps, for each element, in which interval it lies, in a few bits.

It is opaque to Inductor, on purpose: written in plain operators, packing is fused into as many copies of the comparisons as
there are bits, and a step of training took twice the time (`benchmarks/few_bit.py`). What it stands behind stays plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .packing import pack, unpack

_FEW = 31
"""Up to how many borders comparing with each is as quick as halving (on one CPU thread: 17 ms and 25 for 31 borders, 36 and
32 for 63, 1.2 million numbers)."""


@torch.library.custom_op("rewrite::stepped", mutates_args=())
def stepped(
    x: torch.Tensor, y: torch.Tensor, borders: Sequence[float], levels: Sequence[float], closed: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``y``, and for the backward the packed intervals of ``x``: dx = levels[n mod len(levels)] · dy.

    n = #(x > border) + #(x >= border of ``closed``).

    ``y`` has the shape of ``x`` and is a function of it that takes no gradient itself. Nothing else is kept: b bits an
    element for up to 2^b levels. Under autocast it takes x and y in whatever dtype they come.
    """
    place = _above(x, borders)
    for border in closed:
        place += (x >= border).view(torch.uint8)
    return y.clone(), pack(place, bits_of(levels))


def _above(x: torch.Tensor, borders: Sequence[float]) -> torch.Tensor:
    """How many of the borders, in order, each number is above: uint8. By halving where there are many."""
    if len(borders) > _FEW:
        wide = x if x.dtype == torch.float64 else x.float()
        ordered = torch.tensor(borders, dtype=x.dtype, device=x.device)  # rounded as comparing with each rounds them
        return torch.bucketize(wide, ordered.to(wide.dtype), out_int32=True).to(torch.uint8)
    place = (x > borders[0]).view(torch.uint8)
    for border in borders[1:]:
        place += (x > border).view(torch.uint8)
    return place


@stepped.register_fake
def _(
    x: torch.Tensor, y: torch.Tensor, borders: Sequence[float], levels: Sequence[float], closed: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(y), x.new_empty((bits_of(levels), (x.numel() + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("rewrite::stepped_backward", mutates_args=())
def stepped_backward(grad: torch.Tensor, planes: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """levels[interval] · grad, linear in ``grad`` and differentiable in it."""
    place = unpack(planes, grad.numel()).view(grad.shape)
    return torch.tensor(levels, dtype=grad.dtype, device=grad.device)[place.int()] * grad


@stepped_backward.register_fake
def _(grad: torch.Tensor, planes: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    return torch.empty_like(grad)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, _, ctx.levels, _ = inputs
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    return stepped_backward(grad, ctx.saved_tensors[0], ctx.levels).to(ctx.dtype), None, None, None, None


def _keep_planes(ctx: Any, inputs: Any, output: Any) -> None:
    _, planes, ctx.levels = inputs
    ctx.save_for_backward(planes)


def _backward_again(ctx: Any, grad: torch.Tensor) -> Any:
    return stepped_backward(grad, ctx.saved_tensors[0], ctx.levels), None, None


stepped.register_autograd(_backward, setup_context=_keep)
stepped_backward.register_autograd(_backward_again, setup_context=_keep_planes)


def bits_of(levels: Sequence[float]) -> int:
    """How many bits the number of a level takes."""
    return (len(levels) - 1).bit_length()
