"""Tiny models that the tests of all lowerings share, with what each is good for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from rewrite.graph.program import Program
from rewrite.numerics.compare import relative_error
from tests.captures import capture


class Mlp(nn.Module):
    """Dropout and batch norm, so that evaluation differs from training; the batch is dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Transformer(nn.Module):
    """One pre-norm block over tokens with a padding mask; batch and length (to 16) are dynamic, it gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm1 = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.norm2 = nn.RMSNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        batch, length = ids.shape
        if length > 16:
            raise ValueError("too long")
        x = self.embed(ids) * scale
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        dropout = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :], dropout)
        x = x + y.transpose(1, 2).reshape(batch, length, 16)
        x = x + self.mlp(self.norm2(x))
        return {"states": x, "pooled": (x.mean(1), x.argmax(-1)), "cache": None, "padded": ~mask}


class Outputs(nn.Module):
    """Every kind of output: a tensor twice, an input, numbers, None, nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {"y": y, "again": y, "x": x, "none": None, "three": 3, "nest": (y.sum(), [y > 0]), "batch": x.shape[0]}


def mlp() -> Program:
    return captured(Mlp).clone()


def transformer() -> Program:
    return captured(Transformer).clone()


@functools.cache
def captured(kind: type[nn.Module]) -> Program:
    torch.manual_seed(0)
    return capture(kind(), tokens(2, 6) if kind is Transformer else (torch.randn(4, 8),))


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids, and a mask whose first row ends with one token of padding."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, -1] = False
    return torch.randint(0, 20, (batch, length), generator=generator), mask


def error(expected: Any, found: Any) -> float:
    """The largest relative error of the tensors of two outputs, whose structure and other values must be equal."""
    assert pytree.tree_structure(expected) == pytree.tree_structure(found)
    errors = [0.0]
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
            errors.append(relative_error(a, b))
        else:
            assert type(a) is type(b)
            assert a == b
    return max(errors)
