"""How a form is run, and the numbers that it is run on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.numerics.exact import ExactArithmetic

ITSELF = " itself"
"""What the gradient is called that a parameter which follows from old ones has by itself, behind its name."""


@dataclass(frozen=True)
class Setting:
    """How a form is run: in exact arithmetic or its own dtype (or ``dtype``), training or not, in which contexts.

    The last of ``calls`` calls counts. Parameters are moved by normal noise of ``moved`` times their own scale, the same in
    both forms: what holds a value that follows from an old parameter shows itself. ``draw`` numbers the random numbers of a
    run, where ``seed`` stands for all else. ``silent`` sets the rate of each dropout to 0. ``nudged`` moves each number of
    the parameters by an ulp: what rounding at their size does. With ``apart`` a parameter that follows from old ones has a
    gradient of its own, "NAME itself", in place of its share of theirs: that is how a model is trained, and where it rounds.
    """

    exact: bool = True
    training: bool = False
    gradients: bool = True
    dtype: torch.dtype | None = None
    autocast: bool = False
    calls: int = 1
    moved: float = 0.0
    seed: int = 0
    draw: int = 0
    silent: bool = False
    nudged: bool = False
    apart: bool = False


def cast(tensor: torch.Tensor, setting: Setting) -> torch.Tensor:
    """A tensor in the dtype that a setting runs in."""
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor if setting.dtype is None else tensor.to(setting.dtype)
    return tensor.double() if setting.exact else tensor


def given_to(value: torch.Tensor, setting: Setting) -> torch.Tensor:
    """A border value as a form is given it: a copy."""
    return cast(value.detach(), setting).clone()


def leaf(value: torch.Tensor, setting: Setting) -> torch.Tensor:
    """The same as a leaf of the gradient."""
    wants = setting.gradients and (value.is_floating_point() or value.is_complex())
    return value.clone().requires_grad_(wants)


def contexts(setting: Setting, values: Sequence[torch.Tensor]) -> list[AbstractContextManager[Any]]:
    """What a setting runs in: its arithmetic, autocast, gradients, a random state of its own."""
    device = values[0].device.type if values else "cpu"
    contexts: list[AbstractContextManager[Any]] = [torch.random.fork_rng(devices=[])]
    contexts.append(torch.enable_grad() if setting.gradients else torch.no_grad())
    contexts.append(torch.autocast(device, torch.bfloat16) if setting.autocast else nullcontext())
    contexts.append(ExactArithmetic() if setting.exact else nullcontext())
    return contexts


def one_ulp(value: torch.Tensor) -> torch.Tensor:
    """Each number of a tensor moved by one unit in the last place, up and down in turn."""
    if not value.is_floating_point():
        return value
    up = torch.arange(value.numel()).reshape(value.shape) % 2 == 0
    return torch.where(up.to(value.device), torch.nextafter(value, value + 1), torch.nextafter(value, value - 1))


def projection(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers of the shape, dtype and device of a tensor, the same for the same seed and shape; not to be changed."""
    return _normal(tuple(like.shape), seed).to(like.device, like.dtype)


@functools.lru_cache(maxsize=4)  # both forms of a part, and the parts like it, ask for the same ones
def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
