"""Right rewrites of many kinds, all SAME in both directions: each has to be accepted, at every seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from rewrite import Program, apply
from rewrite.graph.nodes import aten
from rewrite.pipeline.context import Context
from tests.captures import capture

from . import models
from .models import DIM
from .steps import Action, acting, replacing, step

program = functools.cache(models.program)


class Own(nn.Module):
    """What ``function`` computes with a layer's tensors, which this one takes over by name."""

    def __init__(self, old: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, parameter in old.named_parameters():
            setattr(self, name, parameter)
        for name, buffer in old.named_buffers():
            self.register_buffer(name, buffer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def own(path: str, function: Callable[..., Tensor]) -> Action:
    return replacing(path, lambda old: Own(old, function))


def norm_by_hand(layer: Any, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return layer.weight * centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + 1e-5) + layer.bias


def batch_norm(layer: Any, x: Tensor) -> Tensor:
    if layer.training:
        layer.num_batches_tracked.add_(1)
    statistics = layer.running_mean, layer.running_var
    return F.batch_norm(x, *statistics, layer.weight, layer.bias, layer.training)


class TrueGradient(torch.autograd.Function):
    """GELU with its own gradient: Φ(x) + x φ(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return grads[0] * ((1 + torch.erf(x / math.sqrt(2))) / 2 + x * density)


def in_place(x: Tensor) -> Tensor:
    made = torch.erf(x / math.sqrt(2))
    return made.add_(1).mul_(0.5 * x)


class Halves(nn.Module):
    """A linear layer as two, side by side."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        middle = old.out_features // 2
        self.upper, self.lower = nn.Linear(old.in_features, middle), nn.Linear(old.in_features, middle)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.upper(x), self.lower(x)], -1)


def _half(tensor: Tensor, *, last: bool) -> Tensor:
    return tensor.chunk(2)[last]


def in_halves(program: Program, context: Context) -> None:
    old = exchanged(program, context, "blocks.0.first", "blocks.0.halves", Halves)
    for name in ("weight", "bias"):
        for part, last in (("upper", False), ("lower", True)):
            compute = functools.partial(_half, last=last)
            context.edit.set_parameter(f"blocks.0.halves.{part}.{name}", compute, f"{old.target}.{name}")
    context.edit.remove_unused([old], str(old.target), "in two halves")
    context.edit.sweep()


def exchanged(program: Program, context: Context, path: str, new: str, make: Callable[[Any], nn.Module]) -> Node:
    """Insert a layer in place of another's call; the other stays, for its tensors, until it is removed."""
    node = next(n for n in program.graph.nodes if n.target == path)
    made = context.edit.insert_layer(new, make(program.layer(node)), node.all_input_nodes, after=node)
    context.edit.rewire(node, made)
    return node


class Convolution(nn.Module):
    """A linear layer as a convolution of one tap."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.conv = nn.Conv1d(old.in_features, old.out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def as_convolution(program: Program, context: Context) -> None:
    old = exchanged(program, context, "blocks.0.second", "blocks.0.taps", Convolution)
    context.edit.set_parameter("blocks.0.taps.conv.weight", lambda w: w.unsqueeze(-1), f"{old.target}.weight")
    context.edit.set_parameter("blocks.0.taps.conv.bias", torch.clone, f"{old.target}.bias")
    context.edit.remove_unused([old], str(old.target), "as a convolution")
    context.edit.sweep()


def as_a_product(program: Program, context: Context) -> None:
    """The weight is kept at twice its size."""
    context.edit.replace_layer(
        "blocks.0.first", Own(program.module.get_submodule("blocks.0.first"), lambda s, x: F.linear(x, s.weight / 2, s.bias))
    )
    context.edit.set_parameter("blocks.0.first.weight", lambda w: 2 * w, "blocks.0.first.weight")


def fused(program: Program, context: Context) -> None:
    """The activation is computed by the linear layer before it."""
    first = program.module.get_submodule("blocks.0.first")
    context.edit.replace_layer("blocks.0.first", Own(first, lambda s, x: F.gelu(F.linear(x, s.weight, s.bias))))
    context.edit.replace_layer("blocks.0.act", nn.Identity())


def other_way_round(program: Program, context: Context) -> None:
    add = next(n for n in program.graph.nodes if n.name == "add")
    made = context.edit.insert_function(aten.add.Tensor, tuple(reversed(add.args)), after=add)
    context.edit.rewire(add, made)
    context.edit.remove(add)


def inserted(layer: Callable[[], nn.Module]) -> Action:
    def action(program: Program, context: Context) -> None:
        node = next(n for n in program.graph.nodes if n.name == "add")
        made = context.edit.insert_layer("more", layer(), [node], after=node)
        context.edit.rewire(node, made, lambda user: user is not made)

    return action


RIGHT: dict[str, Action] = {
    "a layer norm by hand": own("blocks.0.norm", norm_by_hand),
    "a layer norm in double precision": own(
        "blocks.0.norm", lambda s, x: F.layer_norm(x.double(), (DIM,), s.weight.double(), s.bias.double()).to(x.dtype)
    ),
    "a batch norm of one's own": own("batch_norm", batch_norm),
    "an embedding of one's own": own("embed", lambda s, x: F.embedding(x, s.weight, padding_idx=0)),
    "a linear layer as matmul": own("blocks.0.first", lambda s, x: x @ s.weight.t() + s.bias),
    "a linear layer as einsum": own("blocks.0.first", lambda s, x: torch.einsum("bti,oi->bto", x, s.weight) + s.bias),
    "a linear layer in two halves": in_halves,
    "a linear layer as a convolution": as_convolution,
    "a weight kept at twice its size": as_a_product,
    "a linear layer with its activation": fused,
    "GELU with its own gradient": acting(lambda x, y, layer: TrueGradient.apply(x)),
    "GELU in place on memory of its own": acting(lambda x, y, layer: in_place(x)),
    "GELU computed anew in the backward pass": acting(lambda x, y, layer: checkpoint(F.gelu, x, use_reentrant=False)),
    "an addition the other way round": other_way_round,
    "a layer that does nothing": inserted(nn.Identity),
    "a dropout of rate 0": inserted(lambda: nn.Dropout(0.0)),
    "a clone": inserted(lambda: Own(nn.Identity(), lambda s, x: x.clone())),
    "transposed twice": inserted(lambda: Own(nn.Identity(), lambda s, x: x.transpose(0, 2).contiguous().transpose(0, 2))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_it_is_accepted(name: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        record = apply(program(), step(RIGHT[name]), seed=seed, crash_folder=tmp_path).history[0]
        assert record.verification is not None
        assert record.verification.passed
        assert record.changes


class Spectrum(nn.Module):
    """The spectrum of a linear layer's output, a complex tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.linear(x))


def test_gradients_of_complex_outputs_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = capture(Spectrum(), (torch.randn(3, DIM),))
    right = own("linear", lambda s, x: x @ s.weight.t() + s.bias)
    apply(given, step(right), crash_folder=tmp_path)
    detached = own("linear", lambda s, x: F.linear(x, s.weight.detach() + 0 * s.weight, s.bias))
    with pytest.raises(Exception, match=r"same: .*gradients 1\.0e"):
        apply(given, step(detached), crash_folder=tmp_path)
