"""A norm behind a value, of the kind that a branch has already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.norms import Norm, norm_of
from rewrite.graph.nodes import fixed_size, tensor_value

if TYPE_CHECKING:
    from rewrite.analysis.branches import Branch
    from rewrite.graph.program import Program


def norm_for(program: Program, branch: Branch, node: Node, gain: float = 1.0) -> nn.Module:
    """A LayerNorm over the last axis of a node's value (an RMSNorm where the branch begins with one), weight ``gain``.

    eps, dtype and device are those of the norm at the branch's start; 1e-5, and those of the model, without one.
    """
    first = next((found for n in branch.norms if (found := norm_of(program, n)) is not None), None)
    value = tensor_value(node)
    assert value is not None
    like = first.weight if first is not None and first.weight is not None else next(program.module.parameters(), value)
    rms, eps = _kind(first)
    size, dtype = int(value.shape[-1]), like.dtype if like.dtype.is_floating_point else value.dtype
    made: nn.Module
    if rms:
        made = nn.RMSNorm(size, eps, device=like.device, dtype=dtype)
    else:
        made = nn.LayerNorm(size, eps, device=like.device, dtype=dtype)
    made.weight = nn.Parameter(torch.full((size,), gain, dtype=dtype, device=like.device))
    return made


def _kind(first: Norm | None) -> tuple[bool, float]:
    return (False, 1e-5) if first is None else (first.kind == "rms", 1e-5 if first.eps is None else first.eps)


def has_last(node: Node, size: int | None = None) -> bool:
    """Whether a node's value has channels of a fixed number (``size``) along its last axis."""
    value = tensor_value(node)
    if value is None or value.dim() < 2:
        return False
    found = fixed_size(value.shape[-1])
    return found is not None and size in (None, found)
