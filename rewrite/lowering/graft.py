"""Giving the user's own class back: a copy of their model with the layers swapped that passes replaced."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.errors import RewriteError, named_line
from rewrite.graph import meta
from rewrite.graph.hooks import hang
from rewrite.graph.nodes import attribute, module_key, module_stack
from rewrite.graph.program import LayerGraph, Program
from rewrite.graph.tree import Places, on_meta, tied
from rewrite.numerics.compare import TOLERANCE, Difference, Mode, Run, clone, difference, run

ROUNDING = 1e-5
"""The largest relative error between two float32 runs of the same operators."""
_PLAIN = (bool, int, float, str, tuple, torch.Size)


def graft(program: Program, model: nn.Module, *, verify: bool = True) -> nn.Module:
    """A copy of ``model`` with the layers that the program's history replaced, and the program's parameters.

    ``model`` is any instance of the captured class with the captured parameter shapes. Unless ``verify`` is False, the
    copy is compared with the program on its example inputs, in both modes: bit for bit, or else in exact arithmetic.

    A module that calls children of its own after the replaced layer (a norm with a built-in activation) becomes an
    nn.Sequential of the new layer, ``layer``, and those children.

    Raises RewriteError, by name, for another class or other shapes; for an edit at a path that is no module of the
    model, or of a module that does more; for a shared module of which one call was edited; and for edits of the graph
    between layers. The model is not changed.
    """
    _check_class(program, model)
    _check_shapes(program, model)
    calls = _Calls.of(program)
    tails = {path: _tail(calls, model, path) for path in _edited_paths(program)}
    made = clone(model)
    _load(made, program, set(tails))
    layers = copy.deepcopy({path: program.module.get_submodule(path) for path in tails}, _own_tensors(program, made))
    places = Places(made)
    for path, layer in layers.items():
        _set(places, made, path, _followed(layer, tails[path]))
    hang(made, program.properties)
    if verify:
        try:
            _verify(program, made)
        except (AttributeError, TypeError) as error:  # the class reads what a new layer does not have
            where = ", ".join(list(tails)[:3])
            raise RewriteError(
                f"your class does not run with the new layers at {where}: {named_line(error)}: save as .pt2"
            ) from error
    return made


def _check_class(program: Program, model: nn.Module) -> None:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, LayerGraph):
        raise RewriteError("graft takes your own model, not a program's module")
    if kind != program.origin.model_class:
        raise RewriteError(
            f"the program was captured from {program.origin.model_class}, this model is a {kind}: "
            "graft onto an instance of the captured class"
        )


def _check_shapes(program: Program, model: nn.Module) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, shape in program.origin.parameter_shapes.items():
        if shapes.get(name) != shape:
            raise RewriteError(
                f"parameter {name} has shape {shapes.get(name)} in this model and {shape} in the captured "
                "one: build it with the captured model's configuration"
            )


def _edited_paths(program: Program) -> Iterator[str]:
    for record in program.history:
        for site in record.changes:
            if site.kind in ("set parameter", "set property"):
                continue
            if site.kind != "replace layer":
                raise RewriteError(
                    f"pass {record.text} changed the graph between layers ({site.kind} at {site.path}): "
                    "that cannot be put into your class; save the program as .pt2"
                )
            yield site.path


@dataclass(frozen=True)
class _Calls:
    """The layer calls of a program by path, and all nodes of each module call by its key."""

    by_path: Mapping[str, Sequence[Node]]
    by_key: Mapping[str, Sequence[Node]]

    @classmethod
    def of(cls, program: Program) -> _Calls:
        by_path: dict[str, list[Node]] = {}
        by_key: dict[str, list[Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_module":
                by_path.setdefault(str(node.target), []).append(node)
            for key, _, _ in module_stack(node):
                by_key.setdefault(key, []).append(node)
        return cls(by_path, by_key)

    def after(self, call: Node) -> tuple[str, ...] | None:
        """The names of the children that follow a layer, one on the other, in its module's call; None if there is more.

        A child that is called twice is more: a sequence has one place for it.
        """
        path = str(call.target)
        chain = [call]
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            if user.op != "call_module" or str(user.target).rpartition(".")[0] != path or user.args != (chain[-1],):
                break
            chain.append(user)
        names = tuple(str(n.target).rpartition(".")[2] for n in chain[1:])
        inside = self.by_key.get(module_key(call), ())
        return names if set(inside) == set(chain) and len(set(names)) == len(names) else None


def _tail(calls: _Calls, model: nn.Module, path: str) -> tuple[str, ...]:
    """The children that the module at ``path`` calls after the layer, as a norm with a built-in activation does.

    Raises RewriteError if the path is no module of the model's, or if the module does anything else.
    """
    module = attribute(model, path)
    if not isinstance(module, nn.Module):
        base = path.rpartition("_")[0]
        if isinstance(attribute(model, base), nn.Module):
            raise RewriteError(
                f"{base} is a module called several times, of which one call was edited: your class "
                "cannot hold that; edit all its calls, or save the program as .pt2"
            )
        raise RewriteError(f"{path} is no module of your model but a call inside its code: save the program as .pt2")
    tails = {() if meta.WHOLE.of(n) else calls.after(n) for n in calls.by_path.get(path, ())}
    tail = tails.pop() if len(tails) == 1 else None
    if tail is None or (tail and len(inspect.signature(module.forward).parameters) != 1):
        raise RewriteError(
            f"{path} is a {type(module).__name__}, which does more than the layer that was replaced in it: "
            "save the program as .pt2"
        )
    return tail


def _followed(layer: nn.Module, tail: tuple[str, ...]) -> nn.Module:
    """The layer, and after it those of its children that the module called there."""
    if not tail:
        return layer
    after = {name: layer.get_submodule(name) for name in tail}
    for name in tail:
        delattr(layer, name)
    return nn.Sequential(OrderedDict(layer=layer, **after))


def _load(made: nn.Module, program: Program, edited: set[str]) -> None:
    """Give the copy the program's values wherever both have a tensor and no layer is swapped."""
    ours = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            parts = name.split(".")
            swapped = any(".".join(parts[:i]) in edited for i in range(1, len(parts)))
            value = ours.get(name)
            if not swapped and value is not None and value.shape == tensor.shape and not value.is_meta:
                tensor.copy_(value)


def _own_tensors(program: Program, made: nn.Module) -> dict[int, Any]:
    """For deepcopy: the program's tensors that the copy has too, so that ties between old and new layers stay."""
    theirs = dict(made.named_parameters(remove_duplicate=False))
    kept: dict[int, Any] = {}
    for group in tied(program.module):
        shared = [theirs[n] for n in group if n in theirs]
        if len({id(t) for t in shared}) == 1:
            kept[id(program.module.get_parameter(group[0]))] = shared[0]
    return kept


def _set(places: Places, model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path, and wherever else the module there is held; plain attributes are carried over."""
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    for attribute_name, value in vars(old).items():
        if isinstance(value, _PLAIN) and not hasattr(layer, attribute_name):
            setattr(layer, attribute_name, value)
    layer.train(old.training)
    places.put(model.get_submodule(parent), name, layer)


def _verify(program: Program, made: nn.Module) -> None:
    if on_meta(made):
        return
    untrained = any(part.kind == "training mode" for part in program.opaque)
    modes: tuple[Mode, ...] = ("eval",) if untrained else ("eval", "train")
    args, kwargs = program.example_args, dict(program.example_kwargs)
    if "use_cache" in program.module.interface.signature.parameters:
        kwargs.setdefault("use_cache", False)
    comparison = _Comparison(program, made, args, kwargs)
    for mode in modes:
        gap, tolerance = comparison.gap(mode)
        if gap.largest > tolerance:
            raise RewriteError(
                f"the grafted model differs from the program in {mode} mode (outputs {gap.outputs:.1e}, "
                f"gradients {gap.gradients:.1e} at {gap.worst_gradient or 'none'}, buffers "
                f"{gap.buffers:.1e}) {gap.problem}: save the program as .pt2"
            )
        if not gap.modal:  # nothing that ran asked for the mode
            return


@dataclass
class _Comparison:
    """A program and the grafted model, run side by side; a program that does not ask for its mode is run in one."""

    program: Program
    made: nn.Module
    args: Any
    kwargs: Any
    runs: dict[bool, Run] = field(default_factory=dict)

    def gap(self, mode: Mode) -> tuple[Difference, float]:
        """The difference and what it may be: none in the own dtype, bit for bit, or little in exact arithmetic; in the
        own dtype where the model's code cannot run in float64 (a float64 limit in a float32 mask overflows, say)."""
        own = self._difference(mode, exact=False)
        if own.largest == 0:
            return own, 0.0
        try:
            return self._difference(mode, exact=True), TOLERANCE
        except RuntimeError:
            return own, ROUNDING

    def _difference(self, mode: Mode, *, exact: bool) -> Difference:
        ours = self.runs.get(exact)
        if ours is None or ours.modal:
            ours = run(self.program.module, self.args, self.kwargs, mode, exact=exact, by_layer=False)
            self.runs[exact] = ours
        return difference(ours, run(self.made, self.args, self.kwargs, mode, exact=exact, by_layer=False))
