"""From ATen calls to ``torch.nn`` layers at the paths they have in the user's model.

Each rule reads one operator call and gives the layer that computes the same, with the owner of its parameters: the
module whose ``weight`` *is* the tensor, by identity. A call without such an owner stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.layers import AutogradFunction, FunctionCall
from rewrite.graph.nodes import attribute, call_arguments, module_key, module_path, overload, packet, tensor_value
from rewrite.torch_private import _BatchNorm

from .calls import LeafCall
from .functions import call_layer
from .leaves import lift_leaf
from .lift_rules import RULES, Lifted, modal
from .skeleton import Skeleton


def lift_layers(graph: Graph, skeleton: Skeleton, model: nn.Module) -> None:
    """Replace operator calls by layers, in place; layers land in ``skeleton``."""
    owners = _Owners(model)
    skeleton.index(graph)
    for node in list(graph.nodes):
        found = overload(node)
        if found is None:
            continue
        call = node.meta.get("call")
        if isinstance(call, LeafCall):
            lift_leaf(graph, node, call, skeleton, model)
            continue
        if call is not None:
            _lift_function(graph, node, call, skeleton)
            continue
        for rule in (RULES.get(packet(node), modal), modal):
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
        return (
            isinstance(module, layer_class)
            or type(module) is nn.Module
            or not type(module).__module__.startswith("torch.nn.")
        )


def _replace(graph: Graph, node: Node, lifted: Lifted, skeleton: Skeleton, owners: _Owners) -> bool:
    layer = lifted.layer()
    owned = dict(lifted.owned)
    nodes = lifted.nodes or (node,)
    whole = skeleton.covers([*nodes, *_sizes_for(nodes)])
    if any(v is not None for v in owned.values()):
        path = owners.find(node, owned, type(layer))
        if path is None:
            return False
    else:
        path, whole = (
            skeleton.path_for([node], _layer_name(node))
            if not _known(node, lifted, skeleton)
            else (module_path(node), whole)
        )
    config = (type(layer).__name__, repr(layer) if lifted.config is None else lifted.config)
    known = skeleton.layers.get(path)
    if known is not None and known[1] != config:
        return False
    if known is None:
        _own(layer, owned, owners)
        skeleton.put(path, layer, config)
    result = nodes[-1]
    with graph.inserting_before(result):
        call = graph.call_module(path, lifted.inputs)
    call.meta = {k: v for k, v in result.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
    call.meta["whole"] = whole and attribute(skeleton.root, module_path(node)) is skeleton.layers[path][0]
    result.replace_all_uses_with(call)
    for each in reversed(nodes):
        graph.erase_node(each)
    return True


def _sizes_for(nodes: tuple[Node, ...]) -> list[Node]:
    """The sizes that the same module call computes for these nodes alone: nobody needs them once a layer stands there."""
    key, found = module_key(nodes[-1]), list(nodes)
    for node in found:
        for source in node.all_input_nodes:
            own = tensor_value(source) is None and module_key(source) == key and source not in found
            if own and all(user in found for user in source.users):
                found.append(source)
    return found[len(nodes) :]


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
    if isinstance(layer, _BatchNorm) and module is not None:
        layer.num_batches_tracked = getattr(module, "num_batches_tracked", None)
        if getattr(module, "momentum", layer.momentum) is None:
            layer.momentum = None  # capture stood a number in for the cumulative average


def _layer_name(node: Node) -> str:
    name = str(packet(node).__name__).strip("_")
    return {"scaled_dot_product_attention": "attention", "type": "type_op"}.get(name, name)


def _lift_function(graph: Graph, node: Node, call: FunctionCall, skeleton: Skeleton) -> None:
    path, _ = skeleton.path_for([node], call.function.__name__)
    skeleton.put(path, AutogradFunction(call))
    call_layer(graph, node, path)
