"""Small whole numbers packed into bytes, bit plane by bit plane."""

from __future__ import annotations

import torch


def packed_bytes(count: int, bits: int) -> int:
    """The bytes of ``count`` packed numbers: ``bits`` planes of one bit each, eight to the byte."""
    return bits * ((count + 7) // 8)


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The lowest ``bits`` bits of uint8 numbers as planes [bits, ⌈n/8⌉]: bit k of byte j is that of number j + k ⌈n/8⌉."""
    flat = numbers.reshape(-1)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(8, -1)
    return torch.stack([_together([(row >> plane) & 1 for row in rows]) for plane in range(bits)])


def unpack(planes: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` numbers that ``pack`` packed, uint8."""
    rows = [_together([(plane >> place) & 1 for plane in planes]) for place in range(8)]
    return torch.cat(rows)[:count]


def _together(bits: list[torch.Tensor]) -> torch.Tensor:
    """The numbers whose bits these are, the lowest first."""
    made = bits[0].clone()
    for place, bit in enumerate(bits[1:], 1):
        made |= bit << place
    return made
