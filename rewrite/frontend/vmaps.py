"""What `torch.vmap` computes, as operators on whole batches: an export holds its inner steps, which are no operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from rewrite.graph.nodes import attribute
from rewrite.torch_private import leave_transforms, make_fx, python_dispatcher, transform_depth

#: The steps by which an export writes down the start of a vmap, its end, and what it loads before the first one.
ENTER, LEAVE, LOAD = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"


def batch_vmaps(module: GraphModule) -> None:
    """Replace each vmap by what it does, found by running its steps on fake tensors and tracing below them.

    A vmap whose steps cannot be run so stays as it is: `refuse_transforms` then says where it is called.
    """
    for part in [part for part in module.modules() if isinstance(part, GraphModule)]:
        for block in list(_blocks(part.graph)):
            with suppress(Exception):
                _replace(part, block)
        if not any(transform_step(node) not in ("", LOAD) for node in part.graph.nodes):
            for node in [node for node in part.graph.nodes if transform_step(node)]:
                part.graph.erase_node(node)


def transform_step(node: Node) -> str:
    """The name of the function transform's step that a node is; empty for an operator."""
    home = str(getattr(node.target, "__module__", ""))
    return str(getattr(node.target, "__name__", "")) if home.startswith("torch._functorch") else ""


def _blocks(graph: Graph) -> Iterator[list[Node]]:
    """The nodes of each outermost vmap, from its start to its end."""
    depth, block = 0, list[Node]()
    for node in graph.nodes:
        step = transform_step(node)
        depth += step == ENTER
        if depth:
            block.append(node)
        depth -= step == LEAVE
        if block and not depth:
            yield block
            block = []


def _replace(module: GraphModule, block: list[Node]) -> None:
    for node in [n for n in block if n.op == "get_attr"]:
        block[0].prepend(node)  # later ones may read it too
        block.remove(node)
    inside = set(block)
    outside = dict.fromkeys(n for node in block for n in node.all_input_nodes if n not in inside)
    held = {n: attribute(module, str(n.target)) for n in outside if n.op == "get_attr"}
    functions = {n: value for n, value in held.items() if not isinstance(value, torch.Tensor)}
    inputs = [n for n in outside if n not in functions]
    outputs = [node for node in block if any(user not in inside for user in node.users)]
    steps = Interpreter(module)

    def run(*values: Any) -> list[Any]:
        steps.env = functions | dict(zip(inputs, values, strict=True))
        for node in block:
            steps.env[node] = steps.run_node(node)
        return [steps.env[node] for node in outputs]

    depth = transform_depth()
    try:
        with python_dispatcher():  # without it, torch 2.11's matmul, which dot becomes, fixes dynamic sizes
            traced = make_fx(run)(*(node.meta["val"] for node in inputs))
    finally:
        leave_transforms(depth)  # where the steps stopped halfway: the next vmap starts at the first level
    _splice(module.graph, block, traced.graph, inputs, outputs)
    for node in [n for n in functions if not n.users]:
        module.graph.erase_node(node)


def _splice(graph: Graph, block: list[Node], traced: Graph, inputs: list[Node], outputs: list[Node]) -> None:
    """Put the traced operators in the place of a block; they are of the module that calls the vmap."""
    where = {name: value for name, value in block[0].meta.items() if name in ("stack_trace", "nn_module_stack")}
    known: dict[Any, Node] = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(block[0]):
        for node in traced.nodes:
            if node.op == "call_function":
                known[node] = graph.node_copy(node, known.__getitem__)
                known[node].meta.update(where)
    results: Any = traced.output_node().args[0]
    for old, new in zip(outputs, results, strict=True):
        old.replace_all_uses_with(known[new])
    for node in reversed(block):
        graph.erase_node(node)
