"""Random draws that two forms make alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rewrite.torch_private import TorchDispatchMode, pytree

Drawn = tuple[str, float, int]
"""One random draw: the operator, its rate, how many numbers."""


class SeededDraws(TorchDispatchMode):
    """Seeds the k-th random draw by (seed, k), so that two forms draw alike."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.count = 0
        self.drawn: list[Drawn] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = (kwargs or {}).get("generator") is not None
        if (
            torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
            and not own
            and not _drops_nothing(func, args, kwargs)
        ):
            torch.manual_seed(self.seed * 1_000_003 + self.count)
            self.count += 1
            found = func(*args, **(kwargs or {}))
            first = next((t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)), None)
            rate = next((a for a in args[1:] if isinstance(a, float)), 0.0)
            self.drawn.append((str(func), rate, 0 if first is None else first.numel()))
            return found
        return func(*args, **(kwargs or {}))


def _drops_nothing(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator drops with a rate of 0: which attention kernel runs, and so whether one draws, sizes decide."""
    arguments = getattr(getattr(func, "_schema", None), "arguments", ())
    place = next((i for i, argument in enumerate(arguments) if argument.name == "dropout_p"), None)
    if place is None:
        return False
    given = args[place] if place < len(args) else kwargs.get("dropout_p", arguments[place].default_value)
    return not given
