"""Hooks on saved tensors inside others: what the inner ones leave as it is goes to those around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rewrite.torch_private import top_saved_hooks


class Outer:
    """The hooks on saved tensors that are active where this is made: autograd itself asks the innermost only."""

    def __init__(self) -> None:
        found = top_saved_hooks()
        self.pack: Callable[[torch.Tensor], Any] = found[0] if found is not None else unlinked
        self.unpack: Callable[[Any], torch.Tensor] = found[1] if found is not None else _same


def unlinked(tensor: torch.Tensor) -> torch.Tensor:
    """What a hook can hold of a tensor that it leaves as it is: autograd gives it back as a part of the graph.

    The tensor itself, saved by the node that made it, would hold that node, which would hold the tensor: without a backward
    neither ever went, and no garbage collector sees it.
    """
    return tensor if tensor.grad_fn is None else tensor.detach()


def _same(tensor: Any) -> Any:
    return tensor
