"""Packing as a pair of GraphModules, which AOTAutograd makes a part of the graphs that it compiles.

The first goes to the end of the forward's graph, for each tensor that lives in there alone, the second to the beginning of
the backward's: both are traced anew for each tensor, and fused with what stands around them. A part of a storage, such as
the queries of a joint projection, is packed by itself, and comes back without the gaps. Called on a tensor that is none of a
trace, as between two compiled graphs, they pack as in eager mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from rewrite.graph.properties import uncompiled
from rewrite.torch_private import is_traced

from .draws import peeked_seed
from .float8 import Floats, floated, from_floats
from .groups import Draw, Groups, grouped, restored
from .heads import by_head, head_order, is_apart
from .packer import BITS, Packer
from .packing import pack, unpack

_packer: ContextVar[Packer] = ContextVar("packs what is not compiled")


@dataclass(frozen=True)
class Plan:
    """How to pack: ``bits`` is 0 where masks alone are, ``heads`` 0 for groups as the numbers lie."""

    bits: int
    group: int
    min_size: int
    is_random: bool
    heads: int
    is_float8: bool


class Eager(NamedTuple):
    """What a packer of eager mode keeps."""

    packer: Packer
    kept: Any


def plan_of(value: Mapping[str, Any]) -> Plan:
    """How the property's value is compiled."""
    bits = value["bits"]
    if not isinstance(bits, int):
        bits = max(BITS) if any(each in BITS for each in bits) else 0
    is_random = bool(bits) and value["rounding"] == "stochastic"
    float8 = value.get("format") == "fp8"
    return Plan(bits, value["group"], value["min_size"], is_random, value.get("heads", 0), float8)


@contextmanager
def packing_by(packer: Packer) -> Iterator[None]:
    """What is not compiled inside is packed by ``packer``."""
    token = _packer.set(packer)
    try:
        yield
    finally:
        _packer.reset(token)


@functools.cache
def hooks(plan: Plan) -> tuple[GraphModule, GraphModule]:
    """Pack and unpack, always the same ones for a plan: what is compiled holds for the hooks that it was compiled with."""
    return _module(functools.partial(_pack, plan)), _module(_unpack)


def _module(function: Callable[[Any], Any]) -> GraphModule:
    graph = Graph()
    given = graph.placeholder("given")
    functools.update_wrapper(function, function.func) if isinstance(function, functools.partial) else None
    graph.output(graph.call_function(function, (given,)))
    return GraphModule(nn.Module(), graph)


def _pack(plan: Plan, tensor: torch.Tensor) -> Any:
    if not is_traced(tensor):
        return _pack_eagerly(tensor)
    counts = tensor.is_floating_point() and tensor.itemsize > 1 and plan.bits
    if not (counts or tensor.dtype is torch.bool) or tensor.numel() < plan.min_size or not is_apart(tensor):
        return (tensor,)
    lay = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    order = head_order(tensor, tensor.numel(), plan.heads) if plan.heads and counts else None
    rows = tensor.permute(lay) if order is None else by_head(tensor, plan.heads).permute(order)
    group = plan.group if order is None else rows[0].numel()
    # plain tuples: others become nodes of the graph that this is traced into
    return _numbers(plan, rows.reshape(-1), group), tuple(rows.shape), order or lay, lay


def _packed(tensor: torch.Tensor) -> Eager:
    packer = _packer.get()
    return Eager(packer, packer.pack(tensor))


_pack_eagerly = uncompiled(_packed, within=True)


def _numbers(plan: Plan, flat: torch.Tensor, group: int) -> tuple[Any, ...]:
    """Booleans as planes and their count, other numbers as `Groups` or `Floats`, told apart by their length."""
    if flat.dtype is torch.bool:
        return pack(flat.to(torch.uint8), 1), flat.numel()
    draw = scattered(peeked_seed(0)) if plan.is_random else None
    return tuple(floated(flat, group, draw) if plan.is_float8 else grouped(flat, plan.bits, group, draw))


def _unpack(kept: Any) -> torch.Tensor:
    if isinstance(kept, Eager):
        return kept.packer.unpack(kept.kept)
    if len(kept) == 1:
        found: torch.Tensor = kept[0]
        return found
    numbers, sizes, order, lay = kept
    tensor = _flat(numbers).view(sizes).permute(_inverse(order))
    if len(order) > len(lay):
        tensor = tensor.flatten(-2)
    return tensor.permute(lay).contiguous().permute(_inverse(lay))


def _flat(numbers: tuple[Any, ...]) -> torch.Tensor:
    if len(numbers) == 2:
        return unpack(*numbers).bool()
    return from_floats(Floats(*numbers)) if len(numbers) == len(Floats._fields) else restored(Groups(*numbers))


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=lambda place: order[place])


def scattered(seed: torch.Tensor) -> Draw:
    """u for each number from a hash of its place, its own bits and the seed, in plain operators, which fuse: for a seed
    at random each u is even on [0, 1), whatever the number. The finalizer of MurmurHash3 (Appleby), the bits in its middle.
    """

    def draw(rows: torch.Tensor) -> torch.Tensor:
        place = torch.arange(rows.numel(), dtype=torch.int32, device=rows.device).view(rows.shape)
        mixed = place + seed.to(torch.int32)
        mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
        mixed = mixed ^ rows.to(torch.float32).view(torch.int32)
        mixed = (mixed ^ ((mixed >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
        mixed = mixed ^ ((mixed >> 16) & 0xFFFF)
        return (mixed & 0xFFFFFF).to(rows.dtype) * 2.0**-24

    return draw
