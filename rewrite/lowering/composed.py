"""A program as an export, put together from its graph: each kind of layer is traced once, and nothing else is.

torch.export would trace every layer of every block again. What a layer computes depends on its configuration and on what
it is given; the graph around the layers, with the sizes of all values, was made when the program was captured.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ConstantArgument, ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from rewrite.graph.export import Inputs
from rewrite.graph.fakes import call_key
from rewrite.graph.nodes import attribute, fixed_size
from rewrite.graph.ops import FOLLOWING
from rewrite.graph.program import LayerGraph
from rewrite.torch_private import TrainingIRVerifier, pytree, set_guards_code

from .convention import argument_names, guards, output, places, ranges
from .layer_traces import NotComposedError, Trace, check_same, is_code, is_plain, kinds_of, mode_of, placed, traced


def composed(module: LayerGraph, inputs: Inputs) -> ExportedProgram:
    """The export of a layer graph in evaluation mode, for a call with ``inputs``; shares the module's tensors.

    Raises NotComposedError where a part runs under autocast, without gradients, under a property, or is code of its own.
    """
    if module.properties:
        raise NotComposedError
    made = _Composer(module)
    made.take_state()
    made.take_inputs(inputs)
    made.take_calls()
    return made.exported(inputs)


class _Composer:
    """The graph of an export as it grows: ``values`` holds what each node of the layer graph has become."""

    def __init__(self, module: LayerGraph) -> None:
        self.module = module
        self.graph = Graph()
        self.values: dict[Node, Any] = {}
        self.held: dict[str, Node] = {}
        self.state: dict[str, torch.Tensor] = {}
        self.constants: dict[str, Any] = {}
        self.inputs: list[InputSpec] = []
        self.mode = mode_of(module.graph)
        self._traces: dict[Hashable, Trace] = {}

    def take_state(self) -> None:
        """Parameters, buffers and constants are inputs of an export's graph, in this order."""
        for name, tensor in self.module.named_parameters(remove_duplicate=False):
            self._hold(name, tensor, InputKind.PARAMETER, "p")
        for path, part in self.module.named_modules(remove_duplicate=False):
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    persistent = name not in part._non_persistent_buffers_set
                    self._hold(f"{path}.{name}".lstrip("."), buffer, InputKind.BUFFER, "b", persistent)
        for target in dict.fromkeys(str(n.target) for n in self.module.graph.nodes if n.op == "get_attr"):
            if target not in self.held:
                value = attribute(self.module, target)
                if not isinstance(value, torch.Tensor):
                    raise NotComposedError
                self._hold(target, value, InputKind.CONSTANT_TENSOR, "c")

    def _hold(self, name: str, tensor: torch.Tensor, kind: InputKind, prefix: str, persistent: bool | None = None) -> None:
        node = self._placeholder(f"{prefix}_{re.sub(r'[^0-9a-zA-Z_]', '_', name)}")
        with self.mode:
            node.meta["val"] = self.module.shapes.like(tensor, self.mode)
        self.held[name] = node
        stored = kind is InputKind.PARAMETER or persistent
        (self.state if stored else self.constants)[name] = tensor
        self.inputs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))

    def _placeholder(self, name: str) -> Node:
        made = self.graph.placeholder(name)
        made.target = made.name  # which is like no other
        return made

    def take_inputs(self, inputs: Inputs) -> None:
        """The leaves of the call, in order: inputs of the layer graph, or values that the capture fixed."""
        given = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        known = places(self.module.interface, inputs, spec)
        for i, leaf in enumerate(leaves):
            name, place = known.get(i, ("fixed", None))
            made = self._placeholder(name)
            made.meta["val"] = leaf if place is None else self._settled(given[place].meta["val"])
            if place is not None:
                self.values[given[place]] = made
            elif isinstance(leaf, torch.Tensor):
                raise NotComposedError
            argument = ConstantArgument(made.name, leaf) if place is None else TensorArgument(made.name)
            self.inputs.append(InputSpec(InputKind.USER_INPUT, argument, None))

    def _settled(self, value: torch.Tensor) -> torch.Tensor:
        """An input whose fixed sizes are numbers, as an export has them, and not symbols that stand for one."""
        sizes, strides = (
            [fixed if (fixed := fixed_size(n)) is not None else n for n in s] for s in (value.shape, value.stride())
        )
        if all(type(a) is type(b) for a, b in zip(sizes, value.shape, strict=True)):
            return value
        with self.mode:
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    def take_calls(self) -> None:
        """Operators as they are, layers as what they compute."""
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self.held[str(node.target)]
                check_same(self.values[node].meta["val"], node.meta.get("val"))
            elif node.op == "call_module":
                self.values[node] = self._layer(node)
            elif node.op == "call_function":
                self.values[node] = self._function(node, self.values)

    def _function(self, node: Node, values: dict[Node, Any]) -> Any:
        given: Any = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = given
        if node.target is operator.getitem and not isinstance(args[0], Node):
            return args[0][args[1]]
        if node.target in FOLLOWING:  # of a tensor, what an export writes out
            return node.target(*torch.fx.map_arg(args, lambda known: known.meta["val"]))
        if not is_plain(node.target):
            raise NotComposedError
        made = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        made.meta["val"] = node.meta["val"]
        return made

    def _layer(self, node: Node) -> Any:
        """The nodes that a layer comes to, from a trace of one like it."""
        path, layer = str(node.target), attribute(self.module, str(node.target))
        if not isinstance(layer, nn.Module) or any(is_code(part) for part in layer.modules()):
            raise NotComposedError
        names = [n for n, _ in (*layer.named_parameters(), *layer.named_buffers())]
        state = {name: self.held[f"{path}.{name}"] for name in names}
        given = (state, *torch.fx.map_arg((node.args, node.kwargs), self.values.__getitem__))
        trace = self._trace_of(layer, kinds_of(given))
        return placed(trace, given, node.meta["val"], self._function)

    def _trace_of(self, layer: nn.Module, fakes: tuple[Any, Any, Any]) -> Trace:
        key = call_key(layer, *fakes[1:], self.mode)
        if key is not None and key in self._traces:
            return self._traces[key]
        made = traced(layer, fakes, self.mode)
        if key is not None:
            self._traces[key] = made
        return made

    def exported(self, inputs: Inputs) -> ExportedProgram:
        """The whole: what the graph returns, how it is called, in which ranges its sizes lie."""
        interface = self.module.interface
        spec = interface.output_specs[1]
        results = self.module.graph.output_node().args[0]
        listed = list(results) if isinstance(results, list | tuple) else [results]
        outputs = torch.fx.map_arg(tuple(listed[: spec.num_leaves]), self.values.__getitem__)
        self.graph.output(outputs)
        in_spec = pytree.tree_structure((inputs.args, dict(inputs.kwargs)))
        call = ModuleCallSignature([], [], in_spec, spec, argument_names(inputs))
        made = ExportedProgram(
            root={},
            graph=self.graph,
            graph_signature=ExportGraphSignature(self.inputs, [output(value) for value in outputs]),
            state_dict=self.state,
            range_constraints=ranges(self.module.graph),
            module_call_graph=[ModuleCallEntry("", call)],
            constants=self.constants,
            verifiers=[TrainingIRVerifier],
        )
        set_guards_code(made, guards(interface))
        return made
