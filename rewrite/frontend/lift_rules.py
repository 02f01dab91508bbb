"""One rule an operator: the layer that it becomes, with its parameters and its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import ModalOperator, ScaledDotProductAttention, TransposedLinear
from rewrite.graph.nodes import aten, fixed_size, overload, packet, tensor_value


@dataclass(frozen=True)
class Lifted:
    """What a rule proposes: a layer, its data arguments, and its parameters and buffers by the name it knows them.

    ``nodes`` are what it stands for, the one with its value last, where that is more than the operator itself.
    """

    layer: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    owned: dict[str, Any] = field(default_factory=dict)
    config: Any = None
    nodes: tuple[Node, ...] = ()


Rule = Callable[[Node, dict[str, Any]], Lifted | None]

RULES: dict[Any, Rule] = {}


def lift_rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register the rule of operators."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, rule))
        return rule

    return register


def modal(node: Node, named: dict[str, Any]) -> Lifted | None:
    """Any other operator whose arguments differ between the modes."""
    modes = node.meta.get("modes")
    found = overload(node)
    if not modes or found is None:
        return None
    values = tuple(None if name in modes else value for name, value in named.items())
    return Lifted(lambda: ModalOperator(found, modes), (values,))


@lift_rule(aten.linear)
def _linear(node: Node, named: dict[str, Any]) -> Lifted | None:
    weight = tensor_value(named["weight"])
    if weight is None or weight.dim() != 2:
        return None
    out, inner = weight.shape
    return Lifted(
        lambda: nn.Linear(int(inner), int(out), bias=named["bias"] is not None, device="meta"),
        (named["input"],),
        {"weight": named["weight"], "bias": named["bias"]},
    )


@lift_rule(aten.matmul)
def _matmul(node: Node, named: dict[str, Any]) -> Lifted | None:
    weight = _untransposed(named["other"])
    if weight is None:
        return _transposed(named["self"], named["other"], None, (node,))
    out, inner = map(int, weight.meta["val"].shape)  # x @ W.T, which is what a linear layer without bias calls
    own = (named["other"], node) if len(named["other"].users) == 1 else (node,)
    return Lifted(
        lambda: nn.Linear(inner, out, bias=False, device="meta"),
        (named["self"],),
        {"weight": weight, "bias": None},
        nodes=own,
    )


def _untransposed(node: Any) -> Node | None:
    """The parameter whose transpose a node is."""
    if not isinstance(node, Node) or packet(node) not in (aten.numpy_T, aten.mT, aten.t, aten.transpose, aten.permute):
        return None
    source, value = node.args[0], tensor_value(node)
    before = tensor_value(source)
    if not isinstance(source, Node) or source.op != "get_attr" or before is None or value is None or value.dim() != 2:
        return None
    return source if value.stride() == before.stride()[::-1] and _sizes_of(value) == _sizes_of(before)[::-1] else None


@lift_rule(aten.addmm)
def _addmm(node: Node, named: dict[str, Any]) -> Lifted | None:
    """x W + b between two reshapes: rows of x flattened, rows of the product put back."""
    before, after = named["mat1"], next(iter(node.users), None)
    plain = named["beta"] == named["alpha"] == 1 and len(node.users) == 1
    if after is None or not plain or not _is_reshape(before) or not _is_reshape(after) or len(before.users) != 1:
        return None
    source, rows, result, weight = (tensor_value(n) for n in (before.args[0], before, after, named["mat2"]))
    if source is None or rows is None or result is None or weight is None or not source.dim():
        return None
    if _sizes_of(rows)[1] != _sizes_of(source)[-1] or _sizes_of(result) != (*_sizes_of(source)[:-1], str(weight.shape[1])):
        return None
    return _transposed(before.args[0], named["mat2"], named["self"], (before, node, after))


def _is_reshape(node: Any) -> bool:
    return isinstance(node, Node) and packet(node) is aten.reshape


def _sizes_of(value: torch.Tensor) -> tuple[str, ...]:
    """A tensor's sizes as text: to compare dynamic ones without a new condition."""
    return tuple(str(size) for size in value.shape)


def _transposed(source: Any, weight: Any, bias: Any, nodes: tuple[Node, ...]) -> Lifted | None:
    value = tensor_value(weight)
    if value is None or value.dim() != 2 or any(fixed_size(size) is None for size in value.shape):
        return None
    if bias is not None and (tensor_value(bias) is None or _sizes_of(bias.meta["val"]) != _sizes_of(value)[1:]):
        return None
    inner, out = (int(size) for size in value.shape)
    return Lifted(
        lambda: TransposedLinear(inner, out, bias=bias is not None, device="meta"),
        (source,),
        {"weight": weight, "bias": bias},
        nodes=nodes,
    )


def convolution(layer_class: Any, transposed: bool) -> Rule:
    """The rule of a convolution."""

    def rule(node: Node, named: dict[str, Any]) -> Lifted | None:
        weight = tensor_value(named["weight"])
        if weight is None or any(isinstance(v, Node) for v in (named["stride"], named["padding"])):
            return None
        groups = named["groups"]
        first, second = int(weight.shape[0]), int(weight.shape[1]) * groups
        inner, out = (first, second) if transposed else (second, first)
        size = tuple(int(s) for s in weight.shape[2:])
        options: dict[str, Any] = {
            "stride": _sizes(named["stride"], size),
            "padding": _sizes(named["padding"], size),
            "dilation": _sizes(named["dilation"], size),
            "groups": groups,
            "bias": named["bias"] is not None,
            "device": "meta",
        }
        if transposed:
            options["output_padding"] = _sizes(named["output_padding"], size)
        return Lifted(
            lambda: layer_class(inner, out, size, **options),
            (named["input"],),
            {"weight": named["weight"], "bias": named["bias"]},
        )

    return rule


def _sizes(value: Any, like: tuple[int, ...]) -> Any:
    if isinstance(value, str | int):
        return value
    values = tuple(value)
    return values * len(like) if len(values) == 1 else values


@lift_rule(aten.embedding)
def _embedding(node: Node, named: dict[str, Any]) -> Lifted | None:
    weight = tensor_value(named["weight"])
    if weight is None or weight.dim() != 2:
        return None
    rows, width = (int(s) for s in weight.shape)
    padding = named["padding_idx"]
    return Lifted(
        lambda: nn.Embedding(
            rows,
            width,
            padding_idx=None if padding == -1 else padding,
            device="meta",
            scale_grad_by_freq=named["scale_grad_by_freq"],
            sparse=named["sparse"],
        ),
        (named["indices"],),
        {"weight": named["weight"]},
    )


@lift_rule(aten.layer_norm)
def _layer_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    shape = tuple(named["normalized_shape"])
    affine = named["weight"] is not None
    if any(isinstance(s, Node) for s in shape) or (named["bias"] is not None and not affine):
        return None
    return Lifted(
        lambda: nn.LayerNorm(
            shape, eps=named["eps"], elementwise_affine=affine, bias=named["bias"] is not None, device="meta"
        ),
        (named["input"],),
        {"weight": named["weight"], "bias": named["bias"]},
    )


@lift_rule(aten.rms_norm)
def _rms_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    shape = tuple(named["normalized_shape"])
    if any(isinstance(s, Node) for s in shape):
        return None
    return Lifted(
        lambda: nn.RMSNorm(shape, eps=named["eps"], elementwise_affine=named["weight"] is not None, device="meta"),
        (named["input"],),
        {"weight": named["weight"]},
    )


@lift_rule(aten.group_norm)
def _group_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    value = tensor_value(named["input"])
    if value is None or (named["weight"] is None) != (named["bias"] is None):
        return None
    return Lifted(
        lambda: nn.GroupNorm(
            named["num_groups"], int(value.shape[1]), eps=named["eps"], affine=named["weight"] is not None, device="meta"
        ),
        (named["input"],),
        {"weight": named["weight"], "bias": named["bias"]},
    )


@lift_rule(aten.batch_norm)
def _batch_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    value, statistics = tensor_value(named["input"]), tensor_value(named["running_mean"])
    if value is None or statistics is None or (named["weight"] is None) != (named["bias"] is None):
        return None
    if "training" not in node.meta.get("modes", {}) and node.meta.get("aligned", False):
        return None  # statistics that are frozen, or updated in both modes, are no BatchNorm layer's
    layer_class = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[value.dim()]
    return Lifted(
        lambda: layer_class(
            int(statistics.shape[0]),
            eps=named["eps"],
            momentum=named["momentum"],
            affine=named["weight"] is not None,
            device="meta",
        ),
        (named["input"],),
        {k: named[k] for k in ("weight", "bias", "running_mean", "running_var")},
    )


@lift_rule(aten.prelu)
def _prelu(node: Node, named: dict[str, Any]) -> Lifted | None:
    weight = tensor_value(named["weight"])
    if weight is None:
        return None
    return Lifted(lambda: nn.PReLU(int(weight.numel()), device="meta"), (named["self"],), {"weight": named["weight"]})


@lift_rule(aten.dropout, aten.dropout_)
def _dropout(node: Node, named: dict[str, Any]) -> Lifted | None:
    if not named["train"] or ("train" not in node.meta.get("modes", {}) and node.meta.get("aligned", False)):
        return None
    inplace = packet(node) is aten.dropout_
    return Lifted(lambda: nn.Dropout(named["p"], inplace), (named["self" if inplace else "input"],))


@lift_rule(aten.scaled_dot_product_attention)
def _attention(node: Node, named: dict[str, Any]) -> Lifted | None:
    if "dropout_p" not in node.meta.get("modes", {}) and node.meta.get("aligned") and named["dropout_p"]:
        return None
    inputs = [named["query"], named["key"], named["value"]]
    if named["attn_mask"] is not None:
        inputs.append(named["attn_mask"])
    return Lifted(
        lambda: ScaledDotProductAttention(named["dropout_p"], named["is_causal"], named["scale"], named["enable_gqa"]),
        tuple(inputs),
    )


def activation(make: Callable[[dict[str, Any]], nn.Module]) -> Rule:
    """The rule of an activation."""

    def rule(node: Node, named: dict[str, Any]) -> Lifted | None:
        if any(isinstance(v, Node) for k, v in list(named.items())[1:]):
            return None
        return Lifted(lambda: make(named), (next(iter(named.values())),))

    return rule


def made_layer(layer_class: Any, options: tuple[str, ...], inplace: bool) -> Callable[[dict[str, Any]], nn.Module]:
    """What makes an activation's layer from the operator's arguments."""

    def make(named: dict[str, Any]) -> nn.Module:
        layer: nn.Module = layer_class(*(named[k] for k in options), inplace=inplace)
        return layer

    return make


ACTIVATIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()),
    "silu": (nn.SiLU, ()),
    "mish": (nn.Mish, ()),
    "selu": (nn.SELU, ()),
    "relu6": (nn.ReLU6, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
}


@lift_rule(aten.elu)
def _elu(node: Node, named: dict[str, Any]) -> Lifted | None:
    if named["scale"] != 1 or named["input_scale"] != 1 or isinstance(named["alpha"], Node):
        return None
    return Lifted(lambda: nn.ELU(named["alpha"]), (named["self"],))


for _rank in (1, 2, 3):
    lift_rule(getattr(aten, f"conv{_rank}d"))(convolution(getattr(nn, f"Conv{_rank}d"), False))
lift_rule(aten.conv_transpose1d)(convolution(nn.ConvTranspose1d, True))
lift_rule(aten.conv_transpose2d)(convolution(nn.ConvTranspose2d, True))
lift_rule(aten.conv_transpose3d)(convolution(nn.ConvTranspose3d, True))


for _name, (_class, _options) in ACTIVATIONS.items():
    for _inplace in (False, True):
        if hasattr(aten, _name + "_" * _inplace):
            lift_rule(getattr(aten, _name + "_" * _inplace))(activation(made_layer(_class, _options, _inplace)))
lift_rule(aten.gelu)(activation(lambda named: nn.GELU(named["approximate"])))
lift_rule(aten.tanh)(activation(lambda named: nn.Tanh()))
lift_rule(aten.sigmoid)(activation(lambda named: nn.Sigmoid()))
lift_rule(aten.softplus)(activation(lambda named: nn.Softplus(named["beta"], named["threshold"])))
