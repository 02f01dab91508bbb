"""With each replaced layer put back the program equals the input bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rewrite.graph.edit import Change
from rewrite.graph.history import Check
from rewrite.graph.program import LayerGraph, Program
from rewrite.numerics.compare import _MODES, Difference

from .same import difference_of, words


def undo_checks(
    before: Program, after: Program, changes: Sequence[Change], args: Any, kwargs: Any, seed: int
) -> Iterator[Check]:
    """With every replaced layer put back, the program must be the input again, bit for bit."""
    undone = put_back(after, changes)
    for mode in _MODES:
        gap = difference_of(before, undone, args, kwargs, mode, seed, exact=False)
        yield Check(f"undo {mode}", gap.largest == 0, _bitwise(gap), gap.largest)


def _bitwise(gap: Difference) -> str:
    return words(gap) if gap.largest or gap.note else "bit for bit"


def put_back(after: Program, changes: Sequence[Change]) -> Program:
    """A copy of ``after`` in which each replaced layer is the old one again."""
    replaced = [c for c in changes if c.kind == "replace layer"]
    other = next((c for c in changes if c.kind != "replace layer"), None)
    if other is not None:
        raise NotImplementedError(f"a {other.kind} cannot be put back yet")
    memo: dict[int, Any] = {}
    module = copy.deepcopy(after.module, memo)
    for change in reversed(replaced):
        _set_layer(module, change.path, copy.deepcopy(change.old, memo))
    return replace(after, module=module)


def _set_layer(module: LayerGraph, path: str, layer: nn.Module | None) -> None:
    assert layer is not None
    current = module.get_submodule(path)
    for holder in module.modules():
        for name, child in holder._modules.items():
            if child is current:
                holder._modules[name] = layer
