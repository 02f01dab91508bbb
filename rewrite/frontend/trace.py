"""One run of ``torch.export`` over an isolated copy of a model: nothing of the user's model is run or changed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from rewrite.errors import RewriteError, named_line
from rewrite.graph.codegen import keyword_safe
from rewrite.graph.copies import copied
from rewrite.graph.export import Inputs, dynamic_choices, quiet, without_lines
from rewrite.graph.hooks import take_down
from rewrite.torch_private import FakeTensorMode, ShapeEnv, _BatchNorm, guards_code, output_spec, pytree

from .as_eager import View, seen_as
from .calls import attach_calls, kept_whole
from .constants import name_constants
from .decisions import Decisions, Known, known_values
from .draws import foreign_draws
from .dropouts import DropoutsApart
from .functions import recorded_functions
from .leaves import keep_leaves
from .refusals import refuse_transforms, why
from .remembered import forgetting
from .vmaps import batch_vmaps

_PLAIN = (
    torch.Tensor,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    int,
    float,
    bool,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


@dataclass
class Trace:
    """What one export gave: the graph, output fields that were dropped, notes, and conditions on sizes."""

    graph_module: GraphModule
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)

    @property
    def output_spec(self) -> pytree.TreeSpec:
        """The containers of the output, whose leaves the graph returns."""
        return output_spec(self.graph_module.graph)


def bind_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Inputs:
    """Bind example inputs to ``forward``; a ``use_cache`` switch that is left open is bound to False."""
    signature = inspect.signature(model.forward)
    given = dict(kwargs or {})
    switch = signature.parameters.get("use_cache")
    try:
        bound = signature.bind(*args, **given)
    except TypeError as error:
        raise RewriteError(f"the inputs do not fit {type(model).__name__}.forward: {error}") from None
    if switch is not None and bound.arguments.get("use_cache") is None:
        bound.arguments["use_cache"] = False
        bound.arguments = {n: bound.arguments[n] for n in signature.parameters if n in bound.arguments}
    return Inputs(signature, bound.args, bound.kwargs)


def isolate(model: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> nn.Module:
    """A deep copy of ``model`` whose tensors are ``replace(tensor)``, by default the model's own."""
    memo: dict[int, Any] = {}
    registered = {id(t) for t in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        for value in [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]:
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                memo[id(value)] = replace(value) if id(value) in registered else value
    try:
        made = copied(model, memo)
    except Exception as error:
        raise RewriteError(
            f"{type(model).__name__} cannot be copied (copy.deepcopy: {named_line(error)}); "
            "capture works on a copy so that your model is not touched"
        ) from error
    for module in made.modules():
        if isinstance(module, _BatchNorm) and module.momentum is None:
            module.momentum = 0.1  # a cumulative average depends on data, which export refuses; lift restores None
    take_down(made)  # properties are no part of a graph
    return made


def fake_copy(model: nn.Module, dtypes: Mapping[torch.dtype, torch.dtype]) -> tuple[nn.Module, FakeTensorMode]:
    """A copy of ``model`` with fake tensors (shapes only), its parameters and buffers in other dtypes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        to = dtypes.get(tensor.dtype, tensor.dtype)
        with mode:
            made = torch.empty_like(tensor, dtype=to, device=tensor.device, requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made

    return isolate(model, fake), mode


def fake_inputs(inputs: Inputs, mode: FakeTensorMode, dtypes: Mapping[torch.dtype, torch.dtype]) -> Inputs:
    """The same inputs as fake tensors, in other dtypes."""

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty(value.shape, dtype=dtypes.get(value.dtype, value.dtype), device=value.device)

    args, kwargs = pytree.tree_map(fake, (inputs.args, dict(inputs.kwargs)))
    return Inputs(inputs.signature, args, kwargs)


def trace(
    model: nn.Module,
    inputs: Inputs,
    *,
    training: bool,
    leaves: Collection[str] = (),
    known: Known | None = None,
    lines: bool = True,
) -> Trace:
    """Export ``model`` (an isolated copy) in one mode, with batch and token dimensions dynamic; the layers at the paths
    ``leaves`` are not looked into. ``known`` holds the values that decide branches, where the copy and inputs have none.
    Without ``lines`` nodes do not say which lines of code made them.

    Raises RewriteError with torch.export's reason when no attempt succeeds.
    """
    model.train(not training)
    model.train(training)  # as when a user changes the mode: what was cached for one mode is dropped there
    dropped: list[str] = []
    notes: list[str] = []
    keep_leaves(model, leaves)
    known = known or known_values(model, inputs.args, dict(inputs.kwargs))
    decided: list[str] = []
    _screen_outputs(model, dropped, known, decided)
    errors: list[Exception] = []
    for dynamic, view in _attempts(inputs, known):
        dropped.clear()
        decided.clear()
        try:
            with (
                quiet(),
                keyword_safe(),
                seen_as(view),
                forgetting(model),
                foreign_draws(notes),
                kept_whole(),
                recorded_functions(notes),
                without_lines(not lines),
            ):
                exported = torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=dynamic, strict=False)
                graph_module = _unlifted(exported)
                batch_vmaps(graph_module)
                attach_calls(graph_module)
            refuse_transforms(graph_module)
            name_constants(graph_module, model)
        except Exception as error:
            errors.append(error)
            continue
        notes += decided
        if len(errors) > 2 and not known.answering:
            notes.append(f"dynamic sizes reduced: {named_line(errors[2])}")
        return Trace(graph_module, dropped, notes, guards_code(exported))
    raise RewriteError(f"torch.export cannot capture {type(model).__name__}: {why(errors[-1])}") from errors[-1]


def _unlifted(exported: ExportedProgram) -> GraphModule:
    """The export as a module whose graph reads parameters by name; it has no code: its graph is read, it is not run."""
    with mock.patch.object(GraphModule, "recompile", return_value=None):
        made = exported.module(check_guards=False)
    assert isinstance(made, GraphModule)
    for part in made.modules():
        if isinstance(part, GraphModule) and part is not made:
            part.recompile()  # the body of an operator, which is run
    return made


def _attempts(inputs: Inputs, known: Known) -> Iterator[tuple[Any, View]]:
    """Dynamic sizes, and how the model's code sees the trace, in the order to try; where the code asks for values that are
    known, once more with answers.
    """
    choices = list(dynamic_choices(inputs))
    yield choices[0], View.EAGER
    yield choices[0], View.FAKE
    yield from ((dynamic, View.TRACED) for dynamic in choices)
    if known.asked:
        known.answering = True
        yield from ((dynamic, View.EAGER) for dynamic in choices)
        yield choices[-1], View.TRACED


def _screen_outputs(model: nn.Module, dropped: list[str], known: Known, decided: list[str]) -> None:
    """Make the copy's forward return only what torch.export can: registered containers of tensors and plain values."""
    forward = model.forward

    @functools.wraps(forward)
    def screened(*args: Any, **kwargs: Any) -> Any:
        with DropoutsApart(), Decisions(known, known.paired(model, args, kwargs), decided):
            outputs = forward(*args, **kwargs)
        return _screen(outputs, "output", dropped)

    model.forward = screened


def _screen(value: Any, name: str, dropped: list[str]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if pytree.tree_is_leaf(value):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            torch.export.register_dataclass(type(value))
            return value
        dropped.append(f"{name} ({type(value).__name__})")
        return None
    if isinstance(value, Mapping):
        kept = {k: _screen(v, f"{name}.{k}", dropped) for k, v in value.items()}
        changed = {k for k, v in kept.items() if v is not value[k]}
        if not changed:
            return value
        kept = {k: v for k, v in kept.items() if k not in changed or v is not None}
        kind: Any = type(value)
        return kind(**kept) if dataclasses.is_dataclass(value) else kind(kept)
    items, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    return pytree.tree_unflatten([_screen(v, f"{name}[{i}]", dropped) for i, v in enumerate(items)], spec)
