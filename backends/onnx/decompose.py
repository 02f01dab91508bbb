"""Operators that ONNX has none for, as others: each by itself, where torch would trace the whole program twice more.

What an operator comes to depends on its arguments, and the sizes of all values are known: an operator without a counterpart
in ONNX is traced on values that have sizes alone, once for all that are alike, and the rest of the graph stays as it is.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind
from torch.fx import Graph, GraphModule, Node

from rewrite.graph.fakes import call_key
from rewrite.lowering.convention import output
from rewrite.lowering.layer_traces import NotComposedError, Trace, is_plain, kinds_of, mode_of, placed, traced_call
from rewrite.torch_private import OpOverload, is_composite

Table = Mapping[Any, Any]


class Decomposed(ExportedProgram):
    """An export that takes its operators apart one by one when ONNX's exporter asks for it."""

    known: Collection[str] = ()

    @classmethod
    def of(cls, exported: ExportedProgram, known: Collection[str]) -> Decomposed:
        """The same export, for an exporter that knows operators of these names."""
        made: Decomposed = _like(exported, cls, exported.graph, exported.graph_signature)
        made.known = known
        return made

    def run_decompositions(self, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        """The export without the operators of a table; by torch, where they are not each on their own."""
        table = dict(decomp_table or {})
        alone = all(spec.kind is OutputKind.USER_OUTPUT for spec in self.graph_signature.output_specs)
        try:
            if options or not table or not alone:
                raise NotComposedError
            graph = _Apart(self.graph, table, self.known).graph
        except NotComposedError:
            whole: ExportedProgram = super().run_decompositions(decomp_table, **options)
            return whole
        results: Any = graph.output_node().args[0]
        signature = ExportGraphSignature(self.graph_signature.input_specs, [output(value) for value in results])
        made: ExportedProgram = _like(self, ExportedProgram, graph, signature)
        return made


def _like(exported: ExportedProgram, kind: type[Any], graph: Graph, signature: ExportGraphSignature) -> Any:
    """An export of another graph with the same inputs."""
    return kind(
        root=exported.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def _is_plain(graph: Graph) -> bool:
    """Whether no operator runs a graph of its own, or writes into what it is given."""
    return all(_is_operator(n) and not _writes(n.target) for n in graph.nodes if n.op not in ("placeholder", "output"))


def _is_operator(node: Node) -> bool:
    return node.op == "call_function" and is_plain(node.target)


def _writes(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _is_apart_from_others(node: Node) -> bool:
    """Whether nothing shares the memory of a value: it was computed, and nothing views it."""
    return node.op == "call_function" and not any(map(_may_alias, (node, *node.users)))


def _may_alias(node: Node) -> bool:
    target: Any = node.target
    if target is operator.getitem:
        return _may_alias(_first(node))
    if not isinstance(target, OpOverload):
        return False
    known = not is_composite(target) or target in _keepable()
    return not known or any(result.alias_info is not None for result in target._schema.returns)


class _Apart:
    """A graph without the operators of a table: ``values`` holds what each node of the other has become."""

    def __init__(self, old: Graph, table: Table, known: Collection[str]) -> None:
        self.graph = Graph()
        self.table = table
        self.known = known
        self.mode = mode_of(old)
        self.values: dict[Node, Any] = {}
        self._traces: dict[Hashable, Trace] = {}
        for node in old.nodes:
            self.values[node] = self._taken(node) if node.op == "call_function" else self._copied(node, self.values)

    def _copied(self, node: Node, values: Mapping[Node, Any]) -> Node:
        made = self.graph.node_copy(node, values.__getitem__)
        if node.op == "placeholder":
            made.target = made.name
        return made

    def _taken(self, node: Node) -> Any:
        if not _is_operator(node):
            raise NotComposedError
        if node.target is operator.getitem and not isinstance(self.values[_first(node)], Node):
            return self.values[_first(node)][node.args[1]]
        if _writes(node.target):
            return self._written(node)
        return self._called(node.target, node)

    def _written(self, node: Node) -> Any:
        """What is written into a value of its own: from there on, the value, under each of its names."""
        target, written = _without_write(node.target), self.values[_first(node)]
        if target is None or not isinstance(written, Node) or not _is_apart_from_others(written):
            raise NotComposedError
        made = self._called(target, node)
        known, new = (each.meta["val"] for each in (written, made))
        if (known.dtype, known.shape) != (new.dtype, new.shape):
            raise NotComposedError
        self.values.update({old: made for old, value in self.values.items() if value is written})
        return made

    def _called(self, target: Any, node: Node) -> Any:
        if self._is_apart(target):
            return self._apart(target, node)
        made = self._copied(node, self.values)
        made.target = target
        return made

    def _is_apart(self, target: Any) -> bool:
        """Whether an operator is of the table, or made of others and never in one: such may alias what they read."""
        if target in self.table or not isinstance(target, OpOverload):
            return target in self.table
        return target.name() not in self.known and is_composite(target) and target not in _keepable()

    def _apart(self, target: Any, node: Node) -> Any:
        """The nodes that an operator comes to, from a trace of one like it."""
        given = torch.fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        trace = self._trace_of(target, kinds_of(given))
        return placed(trace, given, node.meta["val"], self._copied)

    def _trace_of(self, target: Any, fakes: tuple[Any, Any]) -> Trace:
        key = call_key(target, *fakes, self.mode)
        if key is None:
            return self._traced(target, fakes)
        if key not in self._traces:
            self._traces[key] = self._traced(target, fakes)
        return self._traces[key]

    def _traced(self, target: Any, fakes: tuple[Any, Any]) -> Trace:
        """What an operator comes to. Formulas of torch may write into what they made; a second trace has no writes."""
        made = traced_call(lambda args, kwargs: target(*args, **kwargs), fakes, self.mode, decomposition_table=self.table)
        if not _is_plain(made.graph):
            run = torch.func.functionalize(GraphModule({}, made.graph))
            made = Trace(traced_call(run, fakes, self.mode).graph, made.spec)
        made.graph.eliminate_dead_code()
        if not _is_plain(made.graph):
            raise NotComposedError
        return made


def _without_write(target: Any) -> Any:
    """The operator that gives what another writes into its first argument; None where that is all that is known of it."""
    space, _, name = target._schema.name.partition("::")
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in target._schema.arguments]
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    found = getattr(packet, target._schema.overload_name or "default", None)
    return found if name.endswith("_") and written[0] and not any(written[1:]) else None


@functools.cache
def _keepable() -> frozenset[Any]:
    """What torch takes apart where a table says so, and can keep where none does."""
    return frozenset(torch.export.default_decompositions())


def _first(node: Node) -> Node:
    first = node.args[0]
    assert isinstance(first, Node)
    return first
