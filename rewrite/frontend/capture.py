"""``nn.Module`` and example inputs in, ``Program`` out."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from rewrite.errors import RewriteError
from rewrite.graph.codegen import copy_graph
from rewrite.graph.conditions import conditions
from rewrite.graph.interface import Argument, Interface, named_arguments
from rewrite.graph.nodes import aten, attribute, call_arguments, fixed_size, hint_of, overload, packet
from rewrite.graph.program import Dimension, LayerGraph, Opaque, Origin, Program
from rewrite.graph.regions import Region, group_contexts

from .align import MODE_ARGUMENTS, Alignment, align
from .composites import raise_composites
from .flatten import drop_dead, flatten
from .functions import AutogradFunction
from .lift import lift_layers
from .literals import drop_idle_casts, follow_devices, follow_dtypes
from .skeleton import Constants, Skeleton
from .switch import needs_other_graph, switch_modes
from .trace import Inputs, Trace, bind_inputs, fake_copy, fake_inputs, isolate, trace, widened


def capture(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture a model as a program that shares its tensors; the model is neither run nor changed.

    ``args`` and ``kwargs`` are example inputs; their batch and token dimensions become dynamic (give a batch of 2 or
    more: sizes 0 and 1 cannot). Raises RewriteError when torch.export cannot capture the model.
    """
    if isinstance(model, LayerGraph):
        raise RewriteError("this is a program's module already: pass the program itself")
    if not isinstance(model, nn.Module):
        raise RewriteError(f"capture takes an nn.Module, not {type(model).__name__}")
    if isinstance(args, torch.Tensor) or not isinstance(args, Sequence):
        raise RewriteError("args must be a tuple of example inputs: args=(x,)")
    return _Capture(model, bind_inputs(model, args, kwargs)).run(tuple(args), dict(kwargs or {}))


def from_exported(exported: ExportedProgram) -> Program:
    """A program from an export of one mode, made elsewhere: what that mode left out (dropout in eval) is not there."""
    module = exported.module(check_guards=False)
    if exported.example_inputs is None:
        raise RewriteError("it holds no example inputs: export it again with torch.export.save")
    args, kwargs = exported.example_inputs
    inputs = Inputs(inspect.signature(module.forward), tuple(args), dict(kwargs))
    source = Trace(module, guards=list(getattr(exported, "_guards_code", None) or []))
    specs = (source.output_spec, source.output_spec)
    skeleton = Skeleton(module)
    graph = prepared(module)
    interface = _interface(inputs, graph, specs, source)
    drop_idle_casts(graph)
    finish(graph, skeleton, module, source)
    made = LayerGraph(skeleton.root, graph, interface)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    notes = ("read from an export of one mode: what that mode leaves out, such as dropout in eval, is not there",)
    return Program(made, inputs.args, inputs.kwargs, dimensions(graph), opaque_parts(made),
                   Origin("an exported program", shapes, {}, notes))


class _Capture:
    """One capture: the traces it takes and what it measured and noticed."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.inputs = widened(inputs)
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.untrained = ""
        self.dtypes = _other_dtypes(model, inputs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        train = self._timed("export", self._training)
        evaluation = self._timed("check", self._evaluation)
        self.notes += [*train.notes, *(f"output {name} is dropped: it is no registered pytree" for name in train.dropped)]
        began, checked = time.perf_counter(), self.seconds["check"]
        module = self._lift(train, evaluation)
        self.seconds["lift"] = time.perf_counter() - began - (self.seconds["check"] - checked)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        kind = type(self.model)
        origin = Origin(f"{kind.__module__}.{kind.__qualname__}", shapes, self.seconds, tuple(self.notes))
        opaque = opaque_parts(module)
        if self.untrained:
            opaque = (Opaque("", "training mode", self.untrained), *opaque)
        return Program(module, args, kwargs, dimensions(module.graph), opaque, origin)

    def _timed(self, name: str, action: Any) -> Any:
        began = time.perf_counter()
        result = action()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return result

    def _training(self) -> Trace:
        """The model in training mode; in evaluation mode where its training cannot be exported."""
        try:
            return trace(isolate(self.model), self.inputs, training=True)
        except RewriteError as error:
            try:
                found = self._native_evaluation()
            except RewriteError:
                raise error from None
            self.notes.append(f"training mode is not captured, the program trains its evaluation graph: {error}")
            self.untrained = str(error)
            return found

    def _evaluation(self) -> tuple[Trace, bool]:
        """The model in evaluation mode, in another dtype if it can be traced so: one trace answers two questions."""
        try:
            copy, mode = fake_copy(self.model, self.dtypes)
            return trace(copy, fake_inputs(self.inputs, mode, self.dtypes), training=False), True
        except RewriteError as error:
            others = ", ".join(str(d) for d in self.dtypes.values())
            self.notes.append(f"dtypes that the code names are kept as captured: in {others} {error}")
            return self._native_evaluation(), False

    def _native_evaluation(self) -> Trace:
        return trace(isolate(self.model), self.inputs, training=False)

    def _lift(self, train: Trace, evaluation: tuple[Trace, bool]) -> LayerGraph:
        skeleton = Skeleton(self.model)
        graph = prepared(train.graph_module)
        check, recast = self._timed("check", lambda: prepared(evaluation[0].graph_module)), evaluation[1]
        output_specs = (train.output_spec, evaluation[0].output_spec)
        interface = _interface(self.inputs, graph, output_specs, train)
        self._align(graph, check, recast, skeleton)
        finish(graph, skeleton, self.model, train)
        module = LayerGraph(skeleton.root, graph, interface)
        _copy_modes(self.model, module)
        return module

    def _align(self, graph: Graph, check: Graph, recast: bool, skeleton: Skeleton) -> None:
        """Compare with the check trace: where modes differ make regions, and let dtype literals follow."""
        alignment = self._timed("check", lambda: align(graph, check))
        partner = alignment.partner
        if recast and alignment.chunks and needs_other_graph(alignment):
            native = self._timed("check", self._native_evaluation)
            middle = prepared(native.graph_module)
            between = align(middle, check)
            alignment = align(graph, middle)
            partner = {a: between.partner[m] for a, m in alignment.partner.items() if m in between.partner}
            follow_dtypes(middle, between.partner, check, self.dtypes)
        _note_modes(alignment)
        skeleton.index(graph)
        switch_modes(graph, middle if alignment.partner is not partner else check, alignment, skeleton.place)
        drop_idle_casts(graph)
        if recast:
            follow_dtypes(graph, partner, check, self.dtypes)


def _other_dtypes(model: nn.Module, inputs: Inputs) -> dict[torch.dtype, torch.dtype]:
    """For each floating dtype of the parameters (else of the inputs) another one, by which to see what follows it."""
    tensors = list(model.parameters()) or pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    present = [dtype for dtype, _ in counts.most_common()] or [torch.float32]
    if len(present) == 1:
        return {present[0]: torch.bfloat16 if present[0] is not torch.bfloat16 else torch.float32}
    spare = [d for d in (torch.float64, torch.float16, torch.bfloat16, torch.float32) if d not in present]
    return dict(zip(present, spare, strict=False))


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
    normed = {str(n.args[3].target).rpartition(".")[0] for n in graph.nodes
              if packet(n) is aten.batch_norm and isinstance(n.args[3], Node) and n.args[5] is True}
    for node in list(graph.nodes):
        path, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and name == "num_batches_tracked" and path in normed:
            chain = [node]
            for last in chain:
                chain += [u for u in last.users if packet(u) is aten.add_]
            for last in reversed(chain[1:]):
                if not last.users:
                    graph.erase_node(last)


def _note_modes(alignment: Alignment) -> None:
    """Mark which operators were seen in both modes, and which of their arguments depend on it."""
    for ours, theirs in alignment.partner.items():
        ours.meta["aligned"] = True
        if overload(ours) is None:
            continue
        others = call_arguments(theirs)
        modes = {name: (value, others[name]) for name, value in call_arguments(ours).items()
                 if name in MODE_ARGUMENTS and others[name] != value}
        if modes:
            ours.meta["modes"] = modes


def finish(graph: Graph, skeleton: Skeleton, model: nn.Module, train: Trace) -> None:
    """From an aligned flat graph to the layer graph: contexts, composites, layers, devices, constants."""
    skeleton.index(graph)
    group_contexts(graph, skeleton.place)
    raise_composites(graph, skeleton)
    lift_layers(graph, skeleton, model, train.functions)
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
        value = attribute(module, str(node.target))
        if isinstance(value, nn.Module):
            skeleton.root.add_module(str(node.target), value)
        elif isinstance(value, torch.Tensor):
            name = str(node.target).replace(".", "_")
            found[name] = value
            node.target = f"{home}.{name}"
    if found:
        skeleton.root.add_module(home, Constants(found))


def _interface(inputs: Inputs, graph: Graph, output_specs: tuple[Any, Any], train: Trace) -> Interface:
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
    shapes = tuple(tuple(fixed_size(s) for s in n.meta["val"].shape)
                   for n in graph.nodes if n.op == "placeholder")
    values = named_arguments(inputs.signature, inputs.args, inputs.kwargs)
    arguments, position = [], 0
    for name, value in values.items():
        leaves, spec = pytree.tree_flatten(value)
        span = range(position, position + len(leaves))
        position += len(leaves)
        arguments.append(Argument(name, spec, tuple(place.get(i) for i in span),
                                  tuple(None if i in place else leaf for i, leaf in zip(span, leaves, strict=True))))
    plain = {a.name: a.leaves[0] for a in arguments if len(a.leaves) == 1 and a.leaves[0] is not None}
    return Interface(inputs.signature, tuple(arguments), len(place), output_specs, shapes,
                     conditions(train.guards, plain), tuple(train.dropped))


def _copy_modes(model: nn.Module, module: LayerGraph) -> None:
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


