"""Random numbers of training that leave the forward's own draws as they are: a seed is read off the generator, not drawn."""

from __future__ import annotations

import torch


@torch.library.custom_op("rewrite::peeked_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def peeked_seed(salt: int) -> torch.Tensor:
    """A seed from the state of torch's generator and ``salt``, which is left as it was; an int64 on the CPU."""
    return torch.tensor(peek(salt))


@peeked_seed.register_fake
def _(salt: int) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


def peek(salt: int = 0) -> int:
    """What the generator would give next, made another number for each ``salt``."""
    ahead = torch.Generator()
    ahead.set_state(torch.get_rng_state())
    first = int(torch.randint(2**62, (), generator=ahead))
    return (first + salt * 0x9E3779B97F4A7C15) % 2**62


def move_on() -> None:
    """Draw one number: the next seed is another one."""
    torch.rand(())
