"""Normalization layers of a layer graph, whatever class or spelling they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import module_stack, tensor_value
from rewrite.graph.program import Program
from rewrite.graph.spelled import SpelledNorm

Kind = Literal["layer", "rms"]


@dataclass(frozen=True)
class Norm:
    """One normalization in a graph: y = (offset + weight) · n(x) + bias over the axes ``axes`` of x.

    ``kind`` "layer" subtracts the mean and divides by √(variance + eps), "rms" divides by √(mean x² + eps).
    ``channel_axis`` is -1, or 1 for channels-first maps. ``weight`` is the effective gain (offset added), or None;
    ``weight_path`` and ``bias_path`` name the model's own parameters.
    """

    node: Node
    path: str
    kind: Kind
    shape: tuple[int, ...]
    channel_axis: int
    eps: float | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    device: torch.device
    weight_path: str | None = None
    bias_path: str | None = None
    offset: float = 0.0

    @property
    def value(self) -> torch.Tensor:
        """The FakeTensor of the norm's output."""
        found = tensor_value(self.node)
        assert found is not None
        return found

    @property
    def types(self) -> tuple[str, ...]:
        """Names that ``type:`` selects the norm by: the layer's class and the user's."""
        stack = module_stack(self.node)
        user = stack[-1][2].rpartition(".")[2] if stack else ""
        return (self.layer_name, user)

    @property
    def layer_name(self) -> str:
        return "LayerNorm" if self.kind == "layer" else "RMSNorm"


def norm_of(program: Program, node: Node) -> Norm | None:
    """The norm that a node computes, or None."""
    if node.op != "call_module":
        return None
    layer: Any = program.layer(node)
    path = str(node.target)
    if not isinstance(layer, nn.LayerNorm | nn.RMSNorm | SpelledNorm):
        return None
    device = _device(layer, program)
    if isinstance(layer, SpelledNorm):
        weight_path, bias_path = (f"{path}.{n}" if n is not None else None for n in (layer.weight_name, layer.bias_name))
        shape, axis, affine = (layer.channels,), layer.channel_axis, (layer.gain(), layer.shift())
        return Norm(node, path, layer.kind, shape, axis, layer.eps, *affine, device, weight_path, bias_path, layer.offset)
    kind: Kind = "layer" if isinstance(layer, nn.LayerNorm) else "rms"
    weight, bias = layer.weight, getattr(layer, "bias", None)
    weight_path, bias_path = f"{path}.weight" if weight is not None else None, f"{path}.bias" if bias is not None else None
    sizes = tuple(layer.normalized_shape)
    axis, offset = getattr(layer, "channel_axis", -1), getattr(layer, "offset", 0.0)
    if weight is not None and offset:
        weight = nn.Parameter(weight.detach() + offset, weight.requires_grad)
    return Norm(node, path, kind, sizes, axis, layer.eps, weight, bias, device, weight_path, bias_path, offset)


def _device(layer: nn.Module, program: Program) -> torch.device:
    """Where a layer that replaces this one belongs."""
    parameter = next(layer.parameters(), None)
    parameter = next(program.module.parameters(), None) if parameter is None else parameter
    return torch.device("cpu") if parameter is None else parameter.device


def norms(program: Program) -> list[Norm]:
    """Every norm call of the program, in execution order."""
    found = (norm_of(program, node) for node in program.graph.nodes)
    return [norm for norm in found if norm is not None]
