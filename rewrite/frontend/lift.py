"""From ATen calls to ``torch.nn`` layers at the paths they have in the user's model.

Each rule reads one operator call and gives the layer that computes the same, with the owner of its parameters: the
module whose ``weight`` *is* the tensor, by identity. A call without such an owner stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.layers import ModalOperator, ScaledDotProductAttention
from rewrite.graph.nodes import aten, attribute, call_arguments, module_path, overload, packet, tensor_value

from .functions import AutogradFunction, FunctionCall
from .skeleton import Skeleton


@dataclass(frozen=True)
class Lifted:
    """What a rule proposes: a layer, its data arguments, and its parameters and buffers by the name it knows them."""

    layer: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    owned: dict[str, Any] = field(default_factory=dict)
    config: Any = None


Rule = Callable[[Node, dict[str, Any]], Lifted | None]
_RULES: dict[Any, Rule] = {}


def _rule(*packets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(packets, rule))
        return rule
    return register


def lift_layers(graph: Graph, skeleton: Skeleton, model: nn.Module, functions: list[FunctionCall]) -> None:
    """Replace operator calls by layers, in place; layers land in ``skeleton``."""
    owners = _Owners(model)
    skeleton.index(graph)
    for node in list(graph.nodes):
        found = overload(node)
        if found is None:
            continue
        if found is torch.ops.rewrite.autograd_function.default:
            _lift_function(graph, node, skeleton, functions)
            continue
        for rule in (_RULES.get(packet(node), _modal), _modal):
            lifted = rule(node, call_arguments(node))
            if lifted is not None and _replace(graph, node, lifted, skeleton, owners):
                break


class _Owners:
    """Finds the module that holds given tensors under given names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.homes: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=True):
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    self.homes.setdefault(id(tensor), []).append(path)

    def find(self, node: Node, owned: dict[str, Any], layer_class: type[nn.Module]) -> str | None:
        """The path of the module whose attributes are the ``owned`` tensors; the calling module is preferred."""
        tensors = {name: self._tensor(value) for name, value in owned.items()}
        if any(tensors[n] is None and owned[n] is not None for n in owned):
            return None
        first = next((t for t in tensors.values() if t is not None), None)
        if first is None:
            return None
        here = module_path(node)
        candidates = [p for p in self.homes.get(id(first), []) if self._fits(p, tensors)]
        candidates.sort(key=lambda p: (p != here, not self._is_kind(p, layer_class)))
        if candidates and (candidates[0] == here or self._suits(candidates[0], layer_class)):
            return candidates[0]
        return None

    def _tensor(self, value: Any) -> Any:
        return attribute(self.model, str(value.target)) if isinstance(value, Node) and value.op == "get_attr" else None

    def _fits(self, path: str, tensors: dict[str, Any]) -> bool:
        module = self.model.get_submodule(path)
        own = {**module._parameters, **module._buffers}
        return path != "" and all(own.get(name) is tensor for name, tensor in tensors.items())

    def _is_kind(self, path: str, layer_class: type[nn.Module]) -> bool:
        return isinstance(self.model.get_submodule(path), layer_class)

    def _suits(self, path: str, layer_class: type[nn.Module]) -> bool:
        """Whether a module other than the calling one may become such a layer: it is one, or is no other layer."""
        module = self.model.get_submodule(path)
        return isinstance(module, layer_class) or type(module) is nn.Module \
            or not type(module).__module__.startswith("torch.nn.")


def _replace(graph: Graph, node: Node, lifted: Lifted, skeleton: Skeleton, owners: _Owners) -> bool:
    layer = lifted.layer()
    owned = dict(lifted.owned)
    whole = skeleton.covers([node])
    if any(v is not None for v in owned.values()):
        path = owners.find(node, owned, type(layer))
        if path is None:
            return False
    else:
        path, whole = skeleton.path_for([node], _layer_name(node)) if not _known(node, lifted, skeleton) \
            else (module_path(node), whole)
    config = (type(layer).__name__, repr(layer) if lifted.config is None else lifted.config)
    known = skeleton.layers.get(path)
    if known is not None and known[1] != config:
        return False
    if known is None:
        _own(layer, owned, owners)
        skeleton.put(path, layer, config)
    with graph.inserting_before(node):
        call = graph.call_module(path, lifted.inputs)
    call.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
    call.meta["whole"] = whole and attribute(skeleton.root, module_path(node)) is skeleton.layers[path][0]
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return True


def _known(node: Node, lifted: Lifted, skeleton: Skeleton) -> bool:
    """Whether the calling module, called once more, already is this parameterless layer."""
    known = skeleton.layers.get(module_path(node))
    return known is not None and skeleton.covers([node]) and known[1] == (type(known[0]).__name__, repr(known[0]))


def _own(layer: nn.Module, owned: dict[str, Any], owners: _Owners) -> None:
    for name, value in owned.items():
        tensor = owners._tensor(value)
        if name in layer._buffers:
            layer._buffers[name] = tensor
        else:
            layer._parameters[name] = tensor
    path = next((str(v.target).rpartition(".")[0] for v in owned.values() if v is not None), None)
    module = attribute(owners.model, path) if path else None
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and module is not None:
        layer.num_batches_tracked = getattr(module, "num_batches_tracked", None)
        if getattr(module, "momentum", layer.momentum) is None:
            layer.momentum = None  # capture stood a number in for the cumulative average


def _layer_name(node: Node) -> str:
    name = str(packet(node).__name__).strip("_")
    return {"scaled_dot_product_attention": "attention", "type": "type_op"}.get(name, name)


def _lift_function(graph: Graph, node: Node, skeleton: Skeleton, functions: list[FunctionCall]) -> None:
    tensors, index = node.args
    assert isinstance(tensors, list | tuple)
    assert isinstance(index, int)
    call = functions[index]
    path, _ = skeleton.path_for([node], call.function.__name__)
    skeleton.put(path, AutogradFunction(call))
    with graph.inserting_before(node):
        made = graph.call_module(path, tuple(tensors))
    made.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _modal(node: Node, named: dict[str, Any]) -> Lifted | None:
    """Any other operator whose arguments differ between the modes."""
    modes = node.meta.get("modes")
    found = overload(node)
    if not modes or found is None:
        return None
    values = tuple(None if name in modes else value for name, value in named.items())
    return Lifted(lambda: ModalOperator(found, modes), (values,))


@_rule(aten.linear)
def _linear(node: Node, named: dict[str, Any]) -> Lifted | None:
    weight = tensor_value(named["weight"])
    if weight is None or weight.dim() != 2:
        return None
    out, inner = weight.shape
    return Lifted(lambda: nn.Linear(int(inner), int(out), bias=named["bias"] is not None, device="meta"),
                  (named["input"],), {"weight": named["weight"], "bias": named["bias"]})


def _convolution(layer_class: Any, transposed: bool) -> Rule:
    def rule(node: Node, named: dict[str, Any]) -> Lifted | None:
        weight = tensor_value(named["weight"])
        if weight is None or any(isinstance(v, Node) for v in (named["stride"], named["padding"])):
            return None
        groups = named["groups"]
        first, second = int(weight.shape[0]), int(weight.shape[1]) * groups
        inner, out = (first, second) if transposed else (second, first)
        size = tuple(int(s) for s in weight.shape[2:])
        options: dict[str, Any] = {"stride": _sizes(named["stride"], size), "padding": _sizes(named["padding"], size),
                                   "dilation": _sizes(named["dilation"], size), "groups": groups,
                                   "bias": named["bias"] is not None, "device": "meta"}
        if transposed:
            options["output_padding"] = _sizes(named["output_padding"], size)
        return Lifted(lambda: layer_class(inner, out, size, **options), (named["input"],),
                      {"weight": named["weight"], "bias": named["bias"]})
    return rule


def _sizes(value: Any, like: tuple[int, ...]) -> Any:
    if isinstance(value, str | int):
        return value
    values = tuple(value)
    return values * len(like) if len(values) == 1 else values


for _rank in (1, 2, 3):
    _rule(getattr(aten, f"conv{_rank}d"))(_convolution(getattr(nn, f"Conv{_rank}d"), False))
_rule(aten.conv_transpose1d)(_convolution(nn.ConvTranspose1d, True))
_rule(aten.conv_transpose2d)(_convolution(nn.ConvTranspose2d, True))
_rule(aten.conv_transpose3d)(_convolution(nn.ConvTranspose3d, True))


@_rule(aten.embedding)
def _embedding(node: Node, named: dict[str, Any]) -> Lifted | None:
    weight = tensor_value(named["weight"])
    if weight is None or weight.dim() != 2:
        return None
    rows, width = (int(s) for s in weight.shape)
    padding = named["padding_idx"]
    return Lifted(lambda: nn.Embedding(rows, width, padding_idx=None if padding == -1 else padding, device="meta",
                                       scale_grad_by_freq=named["scale_grad_by_freq"], sparse=named["sparse"]),
                  (named["indices"],), {"weight": named["weight"]})


@_rule(aten.layer_norm)
def _layer_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    shape = tuple(named["normalized_shape"])
    affine = named["weight"] is not None
    if any(isinstance(s, Node) for s in shape) or (named["bias"] is not None and not affine):
        return None
    return Lifted(lambda: nn.LayerNorm(shape, eps=named["eps"], elementwise_affine=affine,
                                       bias=named["bias"] is not None, device="meta"),
                  (named["input"],), {"weight": named["weight"], "bias": named["bias"]})


@_rule(aten.rms_norm)
def _rms_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    shape = tuple(named["normalized_shape"])
    if any(isinstance(s, Node) for s in shape):
        return None
    return Lifted(lambda: nn.RMSNorm(shape, eps=named["eps"], elementwise_affine=named["weight"] is not None,
                                     device="meta"), (named["input"],), {"weight": named["weight"]})


@_rule(aten.group_norm)
def _group_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    value = tensor_value(named["input"])
    if value is None or (named["weight"] is None) != (named["bias"] is None):
        return None
    return Lifted(lambda: nn.GroupNorm(named["num_groups"], int(value.shape[1]), eps=named["eps"],
                                       affine=named["weight"] is not None, device="meta"),
                  (named["input"],), {"weight": named["weight"], "bias": named["bias"]})


@_rule(aten.batch_norm)
def _batch_norm(node: Node, named: dict[str, Any]) -> Lifted | None:
    value, statistics = tensor_value(named["input"]), tensor_value(named["running_mean"])
    if value is None or statistics is None or (named["weight"] is None) != (named["bias"] is None):
        return None
    if "training" not in node.meta.get("modes", {}) and node.meta.get("aligned", False):
        return None  # statistics that are frozen, or updated in both modes, are no BatchNorm layer's
    layer_class = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[value.dim()]
    return Lifted(lambda: layer_class(int(statistics.shape[0]), eps=named["eps"], momentum=named["momentum"],
                                      affine=named["weight"] is not None, device="meta"),
                  (named["input"],), {k: named[k] for k in ("weight", "bias", "running_mean", "running_var")})


@_rule(aten.prelu)
def _prelu(node: Node, named: dict[str, Any]) -> Lifted | None:
    weight = tensor_value(named["weight"])
    if weight is None:
        return None
    return Lifted(lambda: nn.PReLU(int(weight.numel()), device="meta"), (named["self"],), {"weight": named["weight"]})


@_rule(aten.dropout, aten.dropout_)
def _dropout(node: Node, named: dict[str, Any]) -> Lifted | None:
    if not named["train"] or ("train" not in node.meta.get("modes", {}) and node.meta.get("aligned", False)):
        return None
    inplace = packet(node) is aten.dropout_
    return Lifted(lambda: nn.Dropout(named["p"], inplace), (named["self" if inplace else "input"],))


@_rule(aten.scaled_dot_product_attention)
def _attention(node: Node, named: dict[str, Any]) -> Lifted | None:
    if "dropout_p" not in node.meta.get("modes", {}) and node.meta.get("aligned") and named["dropout_p"]:
        return None
    inputs = [named["query"], named["key"], named["value"]]
    if named["attn_mask"] is not None:
        inputs.append(named["attn_mask"])
    return Lifted(lambda: ScaledDotProductAttention(named["dropout_p"], named["is_causal"], named["scale"],
                                                    named["enable_gqa"]), tuple(inputs))


def _activation(make: Callable[[dict[str, Any]], nn.Module]) -> Rule:
    def rule(node: Node, named: dict[str, Any]) -> Lifted | None:
        if any(isinstance(v, Node) for k, v in list(named.items())[1:]):
            return None
        return Lifted(lambda: make(named), (next(iter(named.values())),))
    return rule


def _made(layer_class: Any, options: tuple[str, ...], inplace: bool) -> Callable[[dict[str, Any]], nn.Module]:
    def make(named: dict[str, Any]) -> nn.Module:
        layer: nn.Module = layer_class(*(named[k] for k in options), inplace=inplace)
        return layer

    return make


_ACTIVATIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()), "silu": (nn.SiLU, ()), "mish": (nn.Mish, ()), "selu": (nn.SELU, ()),
    "relu6": (nn.ReLU6, ()), "hardswish": (nn.Hardswish, ()), "hardsigmoid": (nn.Hardsigmoid, ()),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)), "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
}
for _name, (_class, _options) in _ACTIVATIONS.items():
    for _inplace in (False, True):
        if hasattr(aten, _name + "_" * _inplace):
            _rule(getattr(aten, _name + "_" * _inplace))(_activation(_made(_class, _options, _inplace)))
_rule(aten.gelu)(_activation(lambda named: nn.GELU(named["approximate"])))
_rule(aten.tanh)(_activation(lambda named: nn.Tanh()))
_rule(aten.sigmoid)(_activation(lambda named: nn.Sigmoid()))
_rule(aten.softplus)(_activation(lambda named: nn.Softplus(named["beta"], named["threshold"])))


@_rule(aten.elu)
def _elu(node: Node, named: dict[str, Any]) -> Lifted | None:
    if named["scale"] != 1 or named["input_scale"] != 1 or isinstance(named["alpha"], Node):
        return None
    return Lifted(lambda: nn.ELU(named["alpha"]), (named["self"],))


