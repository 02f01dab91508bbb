"""What new entries of a weight start from: drawn at its deviation and fan-in, orthogonal rows, ones and zeros, copies.

`normal` has the deviation of the weight that it extends, less by the root of the ratio of fan-ins. `orthogonal` rows are
orthonormal. `zero` is made of zeros and ones, the partial identity (IDInit; ZerO where widths shrink); `hadamard` rows are
those of a Hadamard matrix of size 2^m, times 2^(-(m-1)/2) (ZerO). `copy` repeats the rows there are, with 1 % of noise.
In each no two new rows are equal, so that training can tell them apart.

Sources: Zhao et al., "ZerO Initialization", TMLR 2022; Pan et al., "IDInit", ICLR 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Init = Literal["normal", "zero", "orthogonal", "hadamard", "copy"]
NOISE = 0.01
"""The deviation of what is added to copies, in those of the weight."""


@dataclass(frozen=True)
class Block:
    """A weight of another shape: ``new`` tells for each axis which of its entries are new, ``into`` which axes are read.

    ``copied`` is the old weight with old entries in the places of new ones.
    """

    old: torch.Tensor
    copied: torch.Tensor
    new: tuple[torch.Tensor, ...]
    into: tuple[int, ...]

    @property
    def fan_in(self) -> tuple[int, int]:
        """How many entries a unit reads, before and after."""
        return tuple(math.prod(t.shape[axis] for axis in self.into) for t in (self.old, self.copied))  # type: ignore[return-value]

    @property
    def deviation(self) -> float:
        """The deviation of the old weight; where that is 0 and it is no bias, one over the root of its fan-in."""
        own = float(self.old.detach().double().std()) if self.old.numel() > 1 and not self.old.is_meta else 0.0
        return own or (1 / math.sqrt(self.fan_in[0]) if self.into else 0.0)


def filled(init: Init, block: Block, generator: torch.Generator) -> torch.Tensor:
    """A weight of the new shape, of whose entries the new ones are to be taken."""
    shape, like = block.copied.shape, block.copied
    if like.is_meta:
        return torch.empty_like(like)
    if init == "normal" or init == "copy":
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        old, now = block.fan_in
        drawn = block.deviation * math.sqrt(old / max(now, 1)) * noise
        return drawn.to(like) if init == "normal" else like + (NOISE * drawn).to(like)
    if len(shape) == 1 or not block.into:
        return torch.zeros_like(like)  # a bias
    order = [*(i for i in range(len(shape)) if i not in block.into), *block.into]
    rows, columns = _new(block, order)
    known = like.detach().permute(order).reshape(len(rows), len(columns))[~rows][:, ~columns]
    moved = _matrix(init, rows, columns, known, generator).reshape([shape[i] for i in order])
    return moved.permute([order.index(i) for i in range(len(shape))]).to(like)


def _new(block: Block, order: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows and which columns of the flat weight are new."""
    shape, count = block.copied.shape, len(order) - len(block.into)
    found = []
    for axes in (order[:count], order[count:]):
        new = torch.zeros([shape[i] for i in axes], dtype=torch.bool)
        for place, axis in enumerate(axes):
            new |= block.new[axis].reshape([-1 if i == place else 1 for i in range(len(axes))])
        found.append(new.reshape(-1))
    return found[0], found[1]


def _matrix(
    init: Init, rows: torch.Tensor, columns: torch.Tensor, old: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A matrix whose new rows begin with the old columns, for the new ones are 0 at first, and old rows with the new ones.

    Each row has the pattern of its own number, so that rows that come later are others, or a further one where an ``old``
    row has that already; ones stand in such columns alone.
    """
    found = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for new in (True, False):
        those, later = (rows, columns) if new else (~rows, ~columns)
        order = torch.argsort(later.int(), stable=True)
        count = int((~later).sum()) if init == "zero" and not bool(later.all()) else len(columns)
        made = {"orthogonal": _orthogonal, "hadamard": _hadamard, "zero": _identity}[init](2 * len(rows), count, generator)
        numbers = torch.arange(len(rows))
        if new and len(old):
            own = made.new_zeros(len(made), len(columns)).index_copy_(1, order[:count], made)
            numbers = _apart(own[:, ~columns].to(old), old)
        found[those.nonzero(), order[:count]] = made[numbers[those]]
    return found


def _apart(made: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Which pattern each row takes: its own, or the next of the second half where an old row is the same."""
    weights = torch.linspace(1, 2, old.shape[1], dtype=torch.float64, device=old.device).sin()
    known, keys = ((t.double() * weights).sum(1).cpu() for t in (old, made))
    known = known.sort().values
    place = torch.searchsorted(known, keys).clamp(0, len(known) - 1)
    near = torch.minimum((known[place] - keys).abs(), (known[(place - 1).clamp_min(0)] - keys).abs())
    taken, count = near < 1e-9 * (1 + keys.abs()), len(made) // 2
    numbers, spare = torch.arange(count), count + (~taken[count:]).nonzero().flatten()
    again = taken[:count].nonzero().flatten()[: len(spare)]
    numbers[again] = spare[: len(again)]
    return numbers


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal rows; where there are more rows than columns, blocks of them."""
    blocks = []
    for start in range(0, rows, columns):
        square = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
        blocks.append(square[: min(columns, rows - start)])
    return torch.cat(blocks)


def _hadamard(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of H[i, j] = (-1)^(the ones that i and j have in common) / 2^((m-1)/2); further blocks with other signs."""
    size = 1 << max(columns - 1, 1).bit_length()
    i, j = torch.arange(rows).unsqueeze(1) % size, torch.arange(columns)
    common, ones = i & j, torch.zeros(rows, columns, dtype=torch.int64)
    while bool(common.any()):
        ones, common = ones + (common & 1), common >> 1
    signs = torch.randint(0, 2, (1 + (rows - 1) // size, columns), generator=generator) * 2 - 1
    signs[0] = 1
    found: torch.Tensor = ((1 - 2 * (ones % 2)) * signs[torch.arange(rows) // size]).double() / math.sqrt(size / 2)
    return found


def _identity(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """e_j; in further rounds the difference of two of them, over the root of 2, and then all these below 0."""
    found = torch.zeros(rows, columns, dtype=torch.float64)
    row = torch.arange(rows)
    place, turn = row % columns, row // columns
    found[row, place] = 1.0
    later = (turn > 0) & (turn % columns > 0)
    found[row[later], ((place + turn) % columns)[later]] -= 1.0
    signs = 1 - 2 * ((turn // columns) % 2)
    return signs.unsqueeze(1) * found / found.square().sum(1, keepdim=True).sqrt()
