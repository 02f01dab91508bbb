"""How fast this machine is at what a plan of memory trades in, measured once for each device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .groups import as_pair, quantized, restored

_NUMBERS = 2**20
_ROUNDS = 5


@dataclass(frozen=True)
class Rates:
    """Seconds for one floating-point operation of a product, one byte that an element-wise operator reads or writes, one
    number that is compressed and restored (by its bits), one number of a mask, one byte moved to the host and back (None on
    the host itself).
    """

    flop: float
    byte: float
    packing: dict[int, float]
    masking: float
    moving: float | None


@functools.cache
def rates(device: torch.device) -> Rates:
    """The rates of a device; measured when first asked for, then the same for this process."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(_NUMBERS, generator=generator, device=device)
    square = x.view(1024, 1024)
    mask = (x > 0).float()
    packing = {bits: _seconds(functools.partial(_there_and_back, x, bits, generator)) / _NUMBERS for bits in (8, 4)}
    moving = None
    if device.type != "cpu":
        moving = _seconds(lambda: x.cpu().to(device)) / x.nbytes
    return Rates(
        _seconds(lambda: square @ square) / (2 * 1024**3),
        _seconds(lambda: torch.nn.functional.gelu(x)) / (2 * x.nbytes),
        packing,
        _seconds(lambda: restored(found) if (found := as_pair(mask)) is not None else None) / _NUMBERS,
        moving,
    )


def _there_and_back(x: torch.Tensor, bits: int, generator: torch.Generator) -> None:
    kept = quantized(x, bits, 256, generator)
    if kept is not None:
        restored(kept)


def _seconds(run: Callable[[], object]) -> float:
    """The least of a few runs."""
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
