"""The last steps of a capture: constants, interface, modes, dimensions, opaque parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from rewrite.errors import RewriteError
from rewrite.graph.codegen import copy_graph
from rewrite.graph.conditions import conditions
from rewrite.graph.export import Inputs
from rewrite.graph.interface import Argument, Interface, named_arguments
from rewrite.graph.layers import AutogradFunction, Constants
from rewrite.graph.nodes import aten, attribute, fixed_size, hint_of, packet
from rewrite.graph.program import Dimension, LayerGraph, Opaque
from rewrite.graph.regions import Region
from rewrite.torch_private import pytree

from .composites import raise_composites
from .contexts import group_contexts
from .flatten import drop_dead, flatten
from .lift import lift_layers
from .literals import follow_devices
from .skeleton import Skeleton
from .trace import Trace


def prepared(module: GraphModule) -> Graph:
    """An export's graph, flat, with BatchNorm's counters folded into the calls they belong to."""
    flatten(module)
    graph = copy_graph(module.graph)
    _drop_batch_counters(graph)
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # a view may be impossible once another pass changed its input
    return graph


def _drop_batch_counters(graph: Graph) -> None:
    """Drop ``num_batches_tracked += 1`` where the same module's batch_norm follows: the layer counts by itself."""
    normed = {
        str(n.args[3].target).rpartition(".")[0]
        for n in graph.nodes
        if packet(n) is aten.batch_norm and isinstance(n.args[3], Node) and n.args[5] is True
    }
    for node in list(graph.nodes):
        path, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and name == "num_batches_tracked" and path in normed:
            chain = [node]
            for last in chain:
                chain += [u for u in last.users if packet(u) is aten.add_]
            for last in reversed(chain[1:]):
                if not last.users:
                    graph.erase_node(last)


def finish(graph: Graph, skeleton: Skeleton, model: nn.Module, train: Trace) -> None:
    """From an aligned flat graph to the layer graph: contexts, composites, layers, devices, constants."""
    skeleton.index(graph)
    group_contexts(graph, skeleton.place)
    raise_composites(graph, skeleton)
    lift_layers(graph, skeleton, model)
    follow_devices(graph)
    drop_dead(graph)
    _adopt_constants(graph, skeleton, train.graph_module)
    graph.lint()


def _adopt_constants(graph: Graph, skeleton: Skeleton, module: GraphModule) -> None:
    """Give the skeleton the tensors that the code holds as constants, and the bodies of higher-order operators."""
    found: dict[str, torch.Tensor] = {}
    home = skeleton.fresh("constants")
    for node in list(graph.nodes):
        if node.op != "get_attr" or attribute(skeleton.root, str(node.target)) is not None:
            continue
        value = node.meta.pop("constant", None)
        if value is None:
            value = attribute(module, str(node.target))
        if isinstance(value, nn.Module):
            skeleton.root.add_module(str(node.target), value)
        elif isinstance(value, torch.Tensor):
            name = str(node.target).replace(".", "_")
            found[name] = value
            node.target = f"{home}.{name}"
    if found:
        skeleton.root.add_module(home, Constants(found))


def interface_of(inputs: Inputs, graph: Graph, output_specs: tuple[Any, Any], train: Trace) -> Interface:
    """The calling convention; graph inputs that were plain values are folded and removed."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    flat = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    if len(flat) != len(placeholders):
        raise RewriteError(f"the export has {len(placeholders)} inputs where {len(flat)} were given")
    place: dict[int, int] = {}
    for position, (node, value) in enumerate(zip(placeholders, flat, strict=True)):
        if isinstance(value, torch.Tensor):
            place[position] = len(place)
        else:
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    shapes = tuple(tuple(fixed_size(s) for s in n.meta["val"].shape) for n in graph.nodes if n.op == "placeholder")
    values = named_arguments(inputs.signature, inputs.args, inputs.kwargs)
    arguments, position = [], 0
    for name, value in values.items():
        leaves, spec = pytree.tree_flatten(value)
        span = range(position, position + len(leaves))
        position += len(leaves)
        arguments.append(
            Argument(
                name,
                spec,
                tuple(place.get(i) for i in span),
                tuple(None if i in place else leaf for i, leaf in zip(span, leaves, strict=True)),
            )
        )
    plain = {a.name: a.leaves[0] for a in arguments if len(a.leaves) == 1 and a.leaves[0] is not None}
    return Interface(
        inputs.signature,
        tuple(arguments),
        len(place),
        output_specs,
        shapes,
        conditions(train.guards, plain),
        tuple(train.dropped),
    )


def copy_modes(model: nn.Module, module: LayerGraph) -> None:
    """Give every layer the mode of the module at its path; layers that lifting added take their parent's."""

    def walk(ours: nn.Module, theirs: nn.Module | None, training: bool) -> None:
        ours.training = theirs.training if theirs is not None else training
        for name, child in ours._modules.items():
            if child is not None:
                walk(child, theirs._modules.get(name) if theirs is not None else None, ours.training)

    walk(module, model, model.training)


def dimensions(graph: Graph) -> tuple[Dimension, ...]:
    """Every dimension of every graph input, with the reason where it is static."""
    found = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            fixed = fixed_size(size)
            number = hint_of(size) if fixed is None else fixed
            reason = "" if fixed is None else "an example size of 1" if fixed == 1 else "the model's code fixes it"
            found.append(Dimension(node.name, axis, number, fixed is None, reason))
    return tuple(found)


def opaque_parts(module: LayerGraph) -> tuple[Opaque, ...]:
    """What passes cannot see into: regions (with what made them) and custom autograd functions."""
    found = []
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        layer = attribute(module, str(node.target))
        if type(layer) is Region:
            found.append(Opaque(str(node.target), "region", layer.reason))
        elif isinstance(layer, AutogradFunction):
            function = layer.call.function
            found.append(Opaque(str(node.target), "autograd function", f"{function.__qualname__} has its own backward"))
    return tuple(dict.fromkeys(found))
