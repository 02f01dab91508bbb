"""A program from a graph that torch.export made elsewhere."""

from __future__ import annotations

import inspect

from torch.export import ExportedProgram

from rewrite.errors import RewriteError
from rewrite.graph.export import Inputs
from rewrite.graph.nodes import module_stack
from rewrite.graph.program import LayerGraph, Origin, Program
from rewrite.torch_private import guards_code

from .assemble import dimensions, finish, interface_of, opaque_parts, prepared
from .literals import drop_idle_casts
from .skeleton import Skeleton
from .trace import Trace


def from_exported(exported: ExportedProgram) -> Program:
    """A program from an export of one mode, made elsewhere: what that mode left out (dropout in eval) is not there."""
    module = exported.module(check_guards=False)
    if exported.example_inputs is None:
        raise RewriteError("it holds no example inputs: export it again with torch.export.save")
    args, kwargs = exported.example_inputs
    inputs = Inputs(inspect.signature(module.forward), tuple(args), dict(kwargs))
    source = Trace(module, guards=guards_code(exported))
    specs = (source.output_spec, source.output_spec)
    skeleton = Skeleton(module)
    skeleton.contain(path for node in source.graph_module.graph.nodes for _, path, _ in module_stack(node))
    graph = prepared(module)
    interface = interface_of(inputs, graph, specs, source)
    drop_idle_casts(graph)
    finish(graph, skeleton, module, source)
    made = LayerGraph(skeleton.root, graph, interface)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    notes = ("read from an export of one mode: what that mode leaves out, such as dropout in eval, is not there",)
    return Program(
        made,
        inputs.args,
        inputs.kwargs,
        dimensions(graph),
        opaque_parts(made),
        Origin("an exported program", shapes, {}, notes),
    )
