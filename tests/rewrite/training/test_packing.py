"""Packed numbers come back, and take the bytes that they should."""

from __future__ import annotations

import pytest
import torch

from rewrite.training.groups import as_pair
from rewrite.training.packing import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_there_and_back(bits: int, count: int) -> None:
    numbers = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    planes = pack(numbers, bits)
    assert planes.numel() == packed_bytes(count, bits)
    assert torch.equal(unpack(planes, count), numbers)


def test_only_the_lowest_bits_are_kept() -> None:
    numbers = torch.tensor([0, 1, 2, 3, 4, 5], dtype=torch.uint8)
    assert unpack(pack(numbers, 1), 6).tolist() == [0, 1, 0, 1, 0, 1]


def test_where_each_bit_lies() -> None:
    """Nine numbers are rows of two: bit k of byte j is that of number j + 2 k."""
    planes = pack(torch.tensor([1, 0, 2, 3, 0, 0, 0, 1, 3], dtype=torch.uint8), 2)
    assert planes.tolist() == [[0b10001, 0b01010], [0b10010, 0b00010]]


def test_no_numbers_are_no_mask() -> None:
    assert as_pair(torch.zeros(0)) is None
    pair = as_pair(torch.tensor([0.0, 2.0, 2.0]))
    assert pair is not None
    assert pair.length == 3
