"""Tensors of a layer that training alone reads, which looking into its evaluation does not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .call import Axes, Call

MEANS_OF_GRADIENTS = "means of gradients"


@dataclass(frozen=True)
class Follower:
    """A tensor whose ``axis`` lies along the first one of ``leader``.

    ``of_gradients``: it is a mean of gradients, of which each copy of a channel has a share only.
    """

    name: str
    leader: str
    axis: int = 0
    of_gradients: bool = False


FOLLOWERS: list[tuple[type[nn.Module], tuple[Follower, ...]]] = []


def moves_along(kind: type[nn.Module], *followers: Follower) -> None:
    """Say how the tensors lie that training alone reads of a kind of layers which have no rule."""
    FOLLOWERS.append((kind, followers))


def of_training(call: Call, layer: nn.Module, unread: Mapping[str, torch.Tensor], seen: Sequence[Axes]) -> None:
    """Let tensors that evaluation leaves ``unread`` lie as they are said to; where nothing is said of one, what the layer
    reads (``seen``) keeps its sizes.
    """
    told = {each.name: each for kind, those in FOLLOWERS if isinstance(layer, kind) for each in those}
    for name, tensor in unread.items():
        axes, follower = call.notes.axes_of(tensor), told.get(name)
        if follower is not None:
            call.unify(call.notes.axes_of(getattr(layer, follower.leader))[0], axes[follower.axis])
            call.role(tensor, follower.axis, "elementwise")
            if follower.of_gradients:
                axes[follower.axis].use(MEANS_OF_GRADIENTS)
        elif axes:
            for each in (*seen, axes):
                call.freeze(each, f"what '{name}' of {type(layer).__name__} is for in training is not known")
