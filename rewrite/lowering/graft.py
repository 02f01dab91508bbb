"""Giving the user's own class back: a copy of their model with what passes changed, compared with the program."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError, named_line
from rewrite.graph import meta
from rewrite.graph.copies import copied, uncollected
from rewrite.graph.hooks import hang, take_down
from rewrite.graph.nodes import attribute, hint_of
from rewrite.graph.program import LayerGraph, Program
from rewrite.graph.tree import Places, tied
from rewrite.numerics.compare import clone
from rewrite.numerics.probes import light_copy

from .absent import cached_difference, stand_ins
from .compared import disagreement
from .fitting import Fit, fit, followed, joined, unplaced
from .standing import calls_of, standing

_PLAIN = (bool, int, float, str, tuple, torch.Size)


def graft(program: Program, model: nn.Module, *, verify: bool = True) -> nn.Module:
    """A copy of ``model`` with what the program's history changed, and the program's parameters.

    ``model`` is any instance of the captured class with the captured parameter shapes. Unless ``verify`` is False, the
    copy is compared with the program on its example inputs, in both modes, and in training its gradients: bit for bit, or
    else in exact arithmetic.

    A module that calls children of its own after the replaced layer (a norm with a built-in activation) becomes an
    nn.Sequential of the new layer, ``layer``, and those children; so does one that a layer was inserted right before or
    after. Parameters may have other shapes where the attributes that your class reads follow. Where a module was taken out,
    something stands that your class can call: what gives back its input for a block or a layer that was folded, zeros for a
    branch that your class adds. Such a copy is compared always, and with a cache where your class has one.

    Raises RewriteError, by name, for another class or other shapes; for an edit at a path that is no module of the
    model, or of a module that does more; for a shared module of which one call was edited; for edits of the graph
    between layers; and for a parameter that would be left out. The model is not changed.
    """
    _check_class(program, model)
    _check_shapes(program, model)
    with uncollected():
        fitted = fit(program, model)
        made, layers = _built(program, model, fitted)
    if verify or fitted.gone:
        take_down(made)
        try:
            _verify(_bare(program), made)
        except (AttributeError, TypeError) as error:  # the class reads what a new layer does not have
            where = ", ".join([*layers, *fitted.gone][:3])
            raise RewriteError(
                f"your class does not run with the new layers at {where}: {named_line(error)}: save as .pt2"
            ) from error
    if fitted.gone:
        _verify_cache(program, model, made)
    hang(made, program.properties)
    return made


def _built(program: Program, model: nn.Module, fitted: Fit) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The copy of the model, and the layers of the program that stand in it, by path."""
    made = clone(model)
    places = Places(made)
    _load(made, program, fitted, places)
    wanted = [*fitted.swapped, *(p for beside in (fitted.before, fitted.after) for paths in beside.values() for p in paths)]
    own = _own_tensors(program, made)
    layers = {path: copied(program.module.get_submodule(path), own) for path in wanted}
    for path in _modules_first(program, fitted, model, layers):
        _set(places, made, path, followed(layers[path], fitted.swapped[path]))
    for path in {**fitted.before, **fitted.after}:
        _set(places, made, path, joined(fitted, path, made.get_submodule(path), layers))
    for path, layer in stand_ins(model, program, fitted.gone).items():
        left = [(name, made.get_submodule(f"{path}.{name}")) for name in fitted.gone[path].left]
        _set(places, made, path, nn.Sequential(OrderedDict([("layer", layer), *left])) if left else layer)
    for (path, name), value in fitted.attributes.items():
        if path not in fitted.swapped:
            setattr(made.get_submodule(path), name, value)
    problem = next(unplaced(program, made, fitted), None)
    if problem is not None:
        raise RewriteError(f"your class cannot hold what the passes made of it: {problem}; save the program as .pt2")
    return made, layers


def _bare(program: Program) -> Program:
    """The program without properties: they change no output, and what they draw at random follows the order of layers."""
    if not program.properties:
        return program
    made = light_copy(program)
    made.module.assume({})
    return made


def _modules_first(program: Program, fitted: Fit, model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """The swapped paths, those of whole modules first and their layers told which argument they are given."""
    calls = calls_of(model, program, sorted(fitted.modules)) if fitted.modules else {}
    for path, call in calls.items():
        node = next(n for n in program.graph.nodes if n.op == "call_module" and n.target == path)
        like = meta.VALUE.of(node.all_input_nodes[0])
        shape = [hint_of(size) for size in like.shape]
        made = standing(path, layers[path], call, torch.empty(shape, dtype=like.dtype, device="meta"))
        if made is not layers[path]:
            fitted.adapted.add(path)
            layers[path] = made
    return sorted(fitted.swapped, key=lambda path: path not in fitted.modules)


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


def _load(made: nn.Module, program: Program, fitted: Fit, places: Places) -> None:
    """Give the copy the program's values wherever both have a tensor and no layer is swapped."""
    ours = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
    for name in fitted.resized:
        holder, last = attribute(made, name.rpartition(".")[0] or "") or made, name.rpartition(".")[2]
        value = attribute(program.module, name)
        if isinstance(holder, nn.Module) and isinstance(value, torch.Tensor):
            _resize(holder, last, value, places)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            parts = name.split(".")
            swapped = any(".".join(parts[:i]) in fitted.swapped for i in range(1, len(parts)))
            value = ours.get(name)
            if not swapped and value is not None and value.shape == tensor.shape and not value.is_meta:
                tensor.copy_(value)


def _resize(holder: nn.Module, name: str, value: torch.Tensor, places: Places) -> None:
    """Make room for a parameter or buffer of another shape, or one that was None, where the class has its name."""
    for held in (holder._parameters, holder._buffers):
        old = held.get(name)
        if name in held and (old is None or old.shape != value.shape):
            empty = torch.empty_like(value)
            made = nn.Parameter(empty, value.requires_grad) if held is holder._parameters else empty
            places.set(held, name, made)


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
    difference = disagreement(program, made)
    if difference:
        raise RewriteError(f"the grafted model differs from the program {difference}: save the program as .pt2")


def _verify_cache(program: Program, model: nn.Module, made: nn.Module) -> None:
    """With a cache a class may ask a layer that is gone how long it is."""
    difference = cached_difference(program, model, made)
    if difference:
        raise RewriteError(f"your class needs what the passes took out: {difference}; save the program as .pt2")
