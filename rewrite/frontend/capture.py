"""``nn.Module`` and example inputs in, ``Program`` out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.errors import RewriteError
from rewrite.graph.copies import uncollected
from rewrite.graph.export import Inputs, widened
from rewrite.graph.home import home_of
from rewrite.graph.hooks import hung
from rewrite.graph.nodes import call_arguments, overload
from rewrite.graph.program import LayerGraph, Opaque, Origin, Program
from rewrite.plugins import announced_layers
from rewrite.torch_private import pytree

from .align import MODE_ARGUMENTS, Alignment, align
from .assemble import copy_modes, dimensions, finish, interface_of, opaque_parts, prepared
from .calls import LeafInRegionError
from .capturable import check_capturable
from .decisions import known_values
from .leaves import leaf_paths
from .literals import drop_idle_casts, follow_dtypes
from .skeleton import Skeleton
from .switch import needs_other_graph, switch_modes
from .trace import Trace, bind_inputs, fake_copy, fake_inputs, isolate, trace


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Collection[type[nn.Module]] = (),
) -> Program:
    """Capture a model as a program that shares its tensors; the model is neither run nor changed.

    ``args`` and ``kwargs`` are example inputs; their batch and token dimensions become dynamic (give a batch of 2 or
    more: sizes 0 and 1 cannot). Layers of the classes that installed passes put in, and of ``leaves``, are layers of the
    program as they are. Raises RewriteError when torch.export cannot capture the model.
    """
    if isinstance(model, LayerGraph):
        raise RewriteError("this is a program's module already: pass the program itself")
    if not isinstance(model, nn.Module):
        raise RewriteError(f"capture takes an nn.Module, not {type(model).__name__}")
    check_capturable(model)
    if isinstance(args, torch.Tensor) or not isinstance(args, Sequence):
        raise RewriteError("args must be a tuple of example inputs: args=(x,)")
    inputs = bind_inputs(model, args, kwargs)
    paths = leaf_paths(model, {*leaves, *announced_layers({type(m) for m in model.modules()})})
    while True:
        try:
            with uncollected():
                return _Capture(model, inputs, paths).run(tuple(args), dict(kwargs or {}))
        except LeafInRegionError as error:
            paths.remove(error.path)


class _Capture:
    """One capture: the traces it takes and what it measured and noticed."""

    def __init__(self, model: nn.Module, inputs: Inputs, leaves: Collection[str]) -> None:
        self.model = model
        self.leaves = leaves
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
        home, kind = home_of(self.model), type(self.model)
        origin = Origin(f"{kind.__module__}.{kind.__qualname__}", shapes, self.seconds, tuple(self.notes), home)
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
            return trace(isolate(self.model), self.inputs, training=True, leaves=self.leaves)
        except RewriteError as error:
            try:
                found = self._native_evaluation()
            except RewriteError as other:
                if str(other) == str(error):
                    raise
                raise RewriteError(f"{error}; in evaluation mode: {other}") from other
            self.notes.append(f"training mode is not captured, the program trains its evaluation graph: {error}")
            self.untrained = str(error)
            return found

    def _evaluation(self) -> tuple[Trace, bool]:
        """The model in evaluation mode, in another dtype if it can be traced so: one trace answers two questions."""
        try:
            copy, mode = fake_copy(self.model, self.dtypes)
            given = fake_inputs(self.inputs, mode, self.dtypes)
            known = known_values(self.model, self.inputs.args, dict(self.inputs.kwargs))
            return trace(copy, given, training=False, leaves=self.leaves, known=known, lines=False), True
        except RewriteError as error:
            others = ", ".join(str(d) for d in self.dtypes.values())
            self.notes.append(f"dtypes that the code names are kept as captured: in {others} {error}")
            return self._native_evaluation(), False

    def _native_evaluation(self) -> Trace:
        return trace(isolate(self.model), self.inputs, training=False, leaves=self.leaves)

    def _lift(self, train: Trace, evaluation: tuple[Trace, bool]) -> LayerGraph:
        skeleton = Skeleton(self.model)
        graph = prepared(train.graph_module)
        check, recast = self._timed("check", lambda: prepared(evaluation[0].graph_module)), evaluation[1]
        output_specs = (train.output_spec, evaluation[0].output_spec)
        interface = interface_of(self.inputs, graph, output_specs, train)
        self._align(graph, check, recast, skeleton)
        finish(graph, skeleton, self.model, train)
        module = LayerGraph(skeleton.root, graph, interface)
        copy_modes(self.model, module)
        module.assume(hung(self.model))
        return module

    def _align(self, graph: Graph, check: Graph, recast: bool, skeleton: Skeleton) -> None:
        """Compare with the check trace: where modes differ make regions, and let dtype literals follow."""
        found = self._matched(graph, check, recast)
        _note_modes(found.alignment)
        skeleton.index(graph)
        switch_modes(graph, found.evaluation, found.alignment, skeleton.place)
        drop_idle_casts(graph)
        if recast:
            follow_dtypes(graph, found.partner, check, self.dtypes)

    def _matched(self, graph: Graph, check: Graph, recast: bool) -> _Matched:
        """The graph held against its evaluation: the check trace, or, where that is in another dtype and has operators
        that the graph lacks, one more trace in the model's own dtype, held against both.
        """
        alignment = self._timed("check", lambda: align(graph, check))
        if not recast or not needs_other_graph(alignment):
            return _Matched(alignment, check, alignment.partner)
        native = prepared(self._timed("check", self._native_evaluation).graph_module)
        direct, recasts = align(graph, native), align(native, check).partner
        partner = {ours: recasts[theirs] for ours, theirs in direct.partner.items() if theirs in recasts}
        follow_dtypes(native, recasts, check, self.dtypes)
        return _Matched(direct, native, partner)


@dataclass(frozen=True)
class _Matched:
    """A training graph aligned with an evaluation graph of its dtype, and its partners in the check trace."""

    alignment: Alignment
    evaluation: Graph
    partner: Mapping[Node, Node]


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


def _note_modes(alignment: Alignment) -> None:
    """Mark which operators were seen in both modes, and which of their arguments depend on it."""
    for ours, theirs in alignment.partner.items():
        ours.meta["aligned"] = True
        if overload(ours) is None:
            continue
        others = call_arguments(theirs)
        modes = {
            name: (value, others[name])
            for name, value in call_arguments(ours).items()
            if name in MODE_ARGUMENTS and others[name] != value
        }
        if modes:
            ours.meta["modes"] = modes
