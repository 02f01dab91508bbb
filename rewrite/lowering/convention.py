"""How an export is called: its arguments, what it returns, and for which sizes it holds, from a program's interface."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, OutputKind, OutputSpec, SymIntArgument, TensorArgument
from torch.fx import Graph, Node

from rewrite.graph.export import Inputs
from rewrite.graph.interface import Interface, named_arguments
from rewrite.torch_private import pytree

_SIZE = re.compile(r"\bs(\d+)_(\d+)\b")


def places(interface: Interface, inputs: Inputs, spec: pytree.TreeSpec) -> dict[int, tuple[str, int | None]]:
    """For each leaf of the call the argument's name and the graph input that it is, None for a fixed value."""
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    named = named_arguments(inputs.signature, args, kwargs)
    found: dict[int, tuple[str, int | None]] = {}
    for argument in interface.arguments:
        if argument.name in named:
            leaves = pytree.tree_leaves(named[argument.name])
            found.update({leaf: (argument.name, place) for leaf, place in zip(leaves, argument.leaves, strict=True)})
    return found


def argument_names(inputs: Inputs) -> list[str]:
    """The arguments by name, those of ``*args`` numbered, as torch.export names them."""
    return list(named_arguments(inputs.signature, inputs.args, inputs.kwargs))


def output(value: Any) -> OutputSpec:
    """How an export announces an output."""
    if not isinstance(value, Node):
        return OutputSpec(OutputKind.USER_OUTPUT, ConstantArgument("", value), None)
    is_tensor = isinstance(value.meta["val"], torch.Tensor)
    argument = TensorArgument(value.name) if is_tensor else SymIntArgument(value.name)
    return OutputSpec(OutputKind.USER_OUTPUT, argument, None)


def ranges(graph: Graph) -> dict[Any, Any]:
    """The range of each dynamic size of the inputs, and of the symbols that it is made of."""
    found: dict[Any, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                    environment, expression = size.node.shape_env, size.node.expr
                    found[expression] = environment.bound_sympy(expression)
                    found.update({symbol: environment.var_to_range[symbol] for symbol in expression.free_symbols})
    return found


def guards(interface: Interface) -> list[str]:
    """The conditions on sizes, in the words of torch.export."""
    names = {argument.leaves[0]: argument.name for argument in interface.arguments if len(argument.leaves) == 1}
    return [
        _SIZE.sub(lambda found: f"L['{names[int(found[1])]}'].size()[{found[2]}]", condition.expression)
        for condition in interface.conditions
    ]
