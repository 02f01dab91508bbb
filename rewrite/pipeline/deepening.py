"""New blocks that compute the identity: copies of blocks whose branches add zero, with all modules numbered in order.

A branch adds zero where the projection that writes it, or the gain and bias of the norm that it ends in, are 0; the block's
other weights are drawn anew or copied. Source: Gesmundo and Maile, 2023, section 3.6; Wu et al., "LLaMA Pro", ACL 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.carry import sizes
from rewrite.analysis.norms import norm_of
from rewrite.analysis.writers import Writers, named
from rewrite.axes.fills import Block as Weight
from rewrite.axes.fills import Init, filled
from rewrite.graph.edit import Editor
from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import attribute
from rewrite.graph.program import Program
from rewrite.graph.renumber import renamed

Where = Literal["even", "end", "copy"]


@dataclass(frozen=True)
class Stack:
    """The blocks of one numbered list, in order: the branches of each, by the block's path. ``zeros`` are what writes a
    block's branches, by name, with the value that each gets; ``obstacle`` is why no block can be added.
    """

    path: str
    blocks: Mapping[str, tuple[Branch, ...]]
    zeros: Mapping[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def types(self) -> tuple[str, ...]:
        """Names that ``type:`` selects it by."""
        return ("layers",)


def stacks(program: Program) -> list[Stack]:
    """Every numbered list of blocks of residual branches."""
    found: dict[str, dict[str, list[Branch]]] = {}
    for branch in branches(program):
        parent = branch.block.rpartition(".")[0]
        if branch.block and (branch.parts.projections or branch.parts.spatial):
            found.setdefault(parent, {}).setdefault(branch.block, []).append(branch)
    writers = Writers(program)
    return [_stack(program, writers, path, {b: tuple(own) for b, own in blocks.items()}) for path, blocks in found.items()]


def _stack(program: Program, writers: Writers, path: str, blocks: Mapping[str, tuple[Branch, ...]]) -> Stack:
    try:
        _check_list(program, path, blocks)
        return Stack(path, blocks, {block: tuple(_zeros(program, writers, own)) for block, own in blocks.items()})
    except _Obstacle as obstacle:
        return Stack(path, blocks, obstacle=str(obstacle))


class _Obstacle(Exception):  # noqa: N818, it is caught and told
    """Why a stack cannot get more blocks."""


def _check_list(program: Program, path: str, blocks: Mapping[str, tuple[Branch, ...]]) -> None:
    """That the list has nothing but these blocks, on one stream, each carrying on what the one before gave."""
    holder = attribute(program.module, path)
    numbered = [f"{path}.{name}" for name in holder._modules if name.isdigit()] if isinstance(holder, nn.Module) else []
    if numbered != list(blocks):
        other = next(iter({*numbered} ^ {*blocks}), path)
        raise _Obstacle(f"{other} is no block of residual branches like the others")
    for block, own in blocks.items():
        for branch in own:
            if branch.order == "post":
                raise _Obstacle(
                    f"Post-LN: {named(branch.stream_norms[0])} normalizes the stream itself behind {block}, so that no new "
                    "block is the identity; grow its other dimensions"
                )
            if branch.other not in branch.starts and not branch.parallel:
                raise _Obstacle(f"what {branch.path} is added to is not the value that it reads")
    if len({id(branch.stream) for own in blocks.values() for branch in own}) > 1:
        raise _Obstacle("its blocks stand on several streams, between which there is more than norms")


def _zeros(program: Program, writers: Writers, own: Sequence[Branch]) -> Iterator[tuple[str, float]]:
    """What has to be 0 for some branches to add zero: tensors by name, with their value."""
    for branch in own:
        norm = norm_of(program, branch.end_norms[0]) if branch.end_norms else None
        if norm is not None and norm.weight_path is not None:
            yield norm.weight_path, -norm.offset
            if norm.bias_path is not None:
                yield norm.bias_path, 0.0
            continue
        plan = writers.of(branch.stream, branch.writer)
        if isinstance(plan, str):
            raise _Obstacle(f"{branch.path} cannot be made to add zero: {plan}")
        yield from ((path, 0.0) for path, _ in plan.tensors)


def places(count: int, more: int, where: Where) -> list[int]:
    """Behind which block each new one goes: spread evenly, or all behind the last."""
    return [count - 1] * more if where == "end" else [math.ceil((i + 1) * count / more) - 1 for i in range(more)]


def deepen(edit: Editor, chosen: Sequence[tuple[Stack, int]], where: Where, init: Init, seed: int) -> dict[str, str]:
    """Give stacks so many more blocks each; for each path below a block of the result, the old one that it is or copies.

    The old blocks get other numbers first. ``chosen`` are stacks of the program as it was.
    """
    orders = {s.path: _ordered(s, places(len(s.blocks), more, where)) for s, more in chosen}
    moved = {old: new for order in orders.values() for new, old, is_new in order if not is_new and new != old}
    edit.renumber(moved)
    generator = torch.Generator().manual_seed(seed)
    for stack, _ in chosen:
        last: Node | None = None
        ends: dict[Node, Node] = {}  # with what new blocks were put in, what an old one begins with is what they end in
        for new, old, is_new in orders[stack.path]:
            first, end = _ends(stack.blocks[old])
            first = ends.get(first, first)
            if not is_new:
                last = end
                continue
            last = ends[end] = edit.repeat(renamed(old, moved), new, first, end, last)
            zeros = {renamed(name, {old: new}): value for name, value in stack.zeros[old]}
            _set(edit, new, zeros, None if "copy" in (where, init) else init, generator)
    return {new: old for order in orders.values() for new, old, _ in order}


def _ends(own: Sequence[Branch]) -> tuple[Node, Node]:
    """The values of the stream that a block begins and ends with; of parallel branches all are added, then the stream."""
    first, last, stream = own[0].starts[0], own[-1].addition, own[0].stream
    ahead = [last]
    while ahead:  # through dropouts
        node = ahead.pop()
        for user in (u for u in node.users if u in stream):
            if user not in stream.additions:
                ahead.append(user)
            elif first in user.all_input_nodes:
                last, ahead = user, [user]
    while sizes(last) != sizes(first):  # it goes on in another shape
        last = next(user for user in last.users if user in stream and user not in stream.additions)
    return first, last


def _ordered(stack: Stack, behind: Sequence[int]) -> list[tuple[str, str, bool]]:
    """The blocks of a stack and the new ones: (its path, the old block that it is or copies, whether it is new)."""
    found = []
    for i, block in enumerate(stack.blocks):
        found += [(block, False), *[(block, True)] * behind.count(i)]
    return [(f"{stack.path}.{n}", block, is_new) for n, (block, is_new) in enumerate(found)]


def _set(edit: Editor, path: str, zeros: Mapping[str, float], init: Init | None, generator: torch.Generator) -> None:
    """The weights of a new block: those in ``zeros`` are constant, its matrices drawn anew if there is an ``init``."""
    module = attribute(edit.program.module, path)
    for name, tensor in list(module.named_parameters()):
        value = zeros.get(f"{path}.{name}")
        layer = module.get_submodule(name.rpartition(".")[0])
        if value is not None:
            made = torch.full_like(tensor, value)
        elif init is not None and tensor.dim() > 1 and not isinstance(layer, nn.Embedding) and tensor.is_floating_point():
            made = _drawn(tensor.detach(), layer, init, generator)
        else:
            continue
        edit.set_parameter(f"{path}.{name}", made)


def _drawn(tensor: torch.Tensor, layer: nn.Module, init: Init, generator: torch.Generator) -> torch.Tensor:
    """A weight drawn at the fan-in and the deviation of the old one."""
    out = 1 if isinstance(layer, TransposedLinear) else 0
    new = tuple(torch.ones(size, dtype=torch.bool) for size in tensor.shape)
    into = tuple(axis for axis in range(tensor.dim()) if axis != out)
    return filled(init, Weight(tensor, tensor, new, into), generator)
