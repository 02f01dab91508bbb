"""Blocks: the branches of one layer of a model, with the values before the first and behind the last of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from rewrite.graph.nodes import module_path

from .branches import Branch


@dataclass(frozen=True)
class Block:
    """The branches of layer number ``layer`` in order: the first is added to ``start``, the last one's sum is ``end``."""

    layer: int
    start: Node
    end: Node
    branches: tuple[Branch, ...]

    @property
    def path(self) -> str:
        """The module in whose code the block ends, or that of its branch where that is the model itself."""
        return module_path(self.end) or self.branches[-1].path


def blocks_of(found: Sequence[Branch]) -> list[Block]:
    """The blocks that branches belong to, in order."""
    made = []
    for layer, group in itertools.groupby(found, key=lambda branch: branch.layer):
        own = tuple(group)
        made.append(Block(layer, own[0].other, own[-1].addition, own))
    return made
