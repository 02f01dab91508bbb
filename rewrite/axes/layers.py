"""How each kind of layer treats the dimensions of what it is given: a table of rules by class, the nearest one counts.

A layer without a rule is looked into: what its forward computes is traced into operators, which have theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rewrite.graph.layers import ScaledDotProductAttention, TransposedLinear
from rewrite.torch_private import _BatchNorm, _DropoutNd

from .call import Axes, Call, parameters_of
from .dims import product
from .images import convolved, placed
from .products import attended

LayerRule = Callable[[Call, Any, str], Any]
"""(the call, the layer, its path) -> the dimensions of the value."""
LAYERS: list[tuple[tuple[type[nn.Module], ...], LayerRule]] = []


def layer_rule(*kinds: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Register a rule for classes of layers and what inherits from them."""

    def register(function: LayerRule) -> LayerRule:
        LAYERS.append((kinds, function))
        return function

    return register


def rule_of(layer: nn.Module, besides: LayerRule | None = None) -> LayerRule | None:
    """The rule for a layer's class or the nearest one that it inherits from, None where there is none but ``besides``."""
    found = (rule for kind in type(layer).__mro__ for kinds, rule in LAYERS if kind in kinds and rule is not besides)
    return next(found, None)


def keeps_size(axis: int, why: str, *kinds: type[nn.Module]) -> None:
    """Let layers be treated as those that they inherit from, but for an axis of their weight that cannot change its size.

    That is: layers that compute with all entries along it at once, as a weight that is standardized.
    """

    @layer_rule(*kinds)
    def held(call: Call, layer: Any, path: str) -> Any:
        inherited = rule_of(layer, besides=held)
        assert inherited is not None
        found = inherited(call, layer, path)
        call.freeze([call.notes.axes_of(layer.weight)[axis]], why)
        return found


def _given(call: Call) -> Axes:
    return call.axes(call.node.args[0])


def _vector(call: Call, layer: nn.Module, names: str, dim: Any, role: str, axis: int = 0) -> None:
    """Tensors of a layer that have one axis along a dimension."""
    for name in names.split():
        tensor = getattr(layer, name, None)
        if isinstance(tensor, torch.Tensor) and tensor.dim() > axis and tensor.shape[axis] == dim.size:
            call.unify(dim, call.notes.axes_of(tensor)[axis])
            call.role(tensor, axis, role)


def _like_weight(call: Call, layer: nn.Module, weight: torch.Tensor) -> None:
    """Masks and other tensors of the weight's shape go with it."""
    for tensor in parameters_of(layer):
        if tensor is not weight and tensor.shape == weight.shape:
            for axis, (a, b) in enumerate(zip(call.notes.axes_of(weight), call.notes.axes_of(tensor), strict=True)):
                call.unify(a, b)
                call.role(tensor, axis, "elementwise")


@layer_rule(nn.Linear, TransposedLinear)
def _linear(call: Call, layer: Any, path: str) -> Axes:
    own, weight = _given(call), call.notes.axes_of(layer.weight)
    into, out = (0, 1) if isinstance(layer, TransposedLinear) else (1, 0)
    call.unify(own[-1], weight[into])
    own[-1].use("in")
    call.role(layer.weight, into, "in")
    call.role(layer.weight, out, "out")
    _vector(call, layer, "bias", weight[out], "out")
    _like_weight(call, layer, layer.weight)
    return [*own[:-1], weight[out]]


@layer_rule(nn.Embedding)
def _embedding(call: Call, layer: Any, path: str) -> Axes:
    weight = call.notes.axes_of(layer.weight)
    weight[0].use("index")
    call.role(layer.weight, 0, "rows")
    call.role(layer.weight, 1, "out")
    return [*_given(call), weight[1]]


@layer_rule(nn.LayerNorm, nn.RMSNorm)
def _norm(call: Call, layer: Any, path: str) -> Axes:
    own = _given(call)
    axis = getattr(layer, "channel_axis", -1)
    over = [own[axis]] if axis != -1 else own[len(own) - len(layer.normalized_shape) :]
    for i, dim in enumerate(over):
        dim.use("norm")
        _vector(call, layer, "weight", dim, "elementwise", i)
        _vector(call, layer, "bias", dim, "added", i)
        if layer.weight is None:
            call.attribute(path, "normalized_shape", dim, i)
    return own


@layer_rule(_BatchNorm)
def _batch_norm(call: Call, layer: Any, path: str) -> Axes:
    own = _given(call)
    _vector(call, layer, "weight running_var", own[1], "elementwise")
    _vector(call, layer, "bias running_mean", own[1], "added")
    return own


@layer_rule(nn.GroupNorm)
def _group_norm(call: Call, layer: Any, path: str) -> Axes:
    own = _given(call)
    groups, within = call.split(own[1], layer.num_groups)
    within.use("norm")
    call.attribute(path, "num_groups", groups)
    _vector(call, layer, "weight", own[1], "elementwise")
    _vector(call, layer, "bias", own[1], "added")
    return own


@layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(call: Call, layer: Any, path: str) -> Axes:
    weight = call.notes.axes_of(layer.weight)
    found = convolved(call, _given(call), weight, layer.groups)
    call.role(layer.weight, 0, "out")
    call.role(layer.weight, 1, "in")
    if layer.groups > 1:
        call.attribute(path, "groups", call.split(weight[0], layer.groups)[0])
    _vector(call, layer, "bias", weight[0], "out")
    _like_weight(call, layer, layer.weight)
    return found


@layer_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(call: Call, layer: Any, path: str) -> Any:
    own, weight = _given(call), call.notes.axes_of(layer.weight)
    channel = len(own) - len(weight) + 1
    call.unify(own[channel], weight[0])
    own[channel].use("in")
    call.role(layer.weight, 0, "in")
    call.role(layer.weight, 1, "out")
    out = weight[1]
    if layer.groups > 1:
        groups, _ = call.split(own[channel], layer.groups)
        groups.freeze(f"{path}: groups of a transposed convolution")
        out = product([groups, weight[1]])
    _vector(call, layer, "bias", out, "out")
    call.freeze([*own[channel + 1 :], *weight[2:]], "the order of its entries counts")
    places = [call.rigid(size, "places of a convolution") for size in call.sizes[channel + 1 :]]
    return [*own[:channel], out, *places]


@layer_rule(ScaledDotProductAttention)
def _attention(call: Call, layer: Any, path: str) -> Axes:
    nodes = [*call.node.args, *([call.node.kwargs["attn_mask"]] if "attn_mask" in call.node.kwargs else [])]
    if layer.scale is None:
        call.axes(nodes[0])[-1].use("scale")
    return attended(call, nodes[0], nodes[1], nodes[2], nodes[3] if len(nodes) > 3 else None)


@layer_rule(nn.Softmax, nn.LogSoftmax, nn.Softmin)
def _softmax(call: Call, layer: Any, path: str) -> Axes:
    own = _given(call)
    own[layer.dim if layer.dim is not None else -1].use("softmax")
    return own


@layer_rule(nn.GLU)
def _glu(call: Call, layer: Any, path: str) -> Axes:
    own = _given(call)
    half = own[layer.dim].size // 2
    own[layer.dim] = call.unify(*call.cut(own[layer.dim], [half, half]))
    return own


@layer_rule(nn.PReLU)
def _prelu(call: Call, layer: Any, path: str) -> Axes:
    own = _given(call)
    if layer.weight.numel() > 1:
        _vector(call, layer, "weight", own[1], "elementwise")
    return own


@layer_rule(nn.Flatten, nn.Unflatten)
def _flatten(call: Call, layer: Any, path: str) -> Axes:
    found = call.reshaped(_given(call), call.sizes)
    if isinstance(layer, nn.Unflatten):
        call.freeze(found, "a size that a layer keeps")
    return found


_ELEMENTWISE = """
CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU RReLU SELU SiLU Sigmoid Softplus
Softshrink Softsign Tanh Tanhshrink Threshold
"""


@layer_rule(_DropoutNd, nn.Identity, *(getattr(nn, name) for name in _ELEMENTWISE.split()))
def _carrier(call: Call, layer: Any, path: str) -> Axes:
    return _given(call)


_PLACED = [
    getattr(nn, f"{kind}{n}d") for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool") for n in (1, 2, 3)
]


@layer_rule(*_PLACED, nn.Upsample)
def _pool(call: Call, layer: Any, path: str) -> Any:
    return placed(call)
