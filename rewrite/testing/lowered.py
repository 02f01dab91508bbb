"""Checks of the ways out: the user's own class, the backends, and another capture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError
from rewrite.frontend.capture import capture
from rewrite.graph.program import Program
from rewrite.lowering.fitting import fit
from rewrite.lowering.graft import graft
from rewrite.lowering.inference import evaluated
from rewrite.lowering.lower import lower
from rewrite.numerics.compare import relative_error, verify

from .observe import bytes_of, first_difference, outline, tensors, untouched
from .trial import Trial, changed_paths, differs_from, fail

ULPS = 100
"""By how many units of the last place, relative to the largest value, a backend may differ."""


def check_grafted(trial: Trial) -> str:
    """The user's own class comes back with the pass in it, or is refused by a reason that names the place."""
    model = trial.subject.model
    if model is None:
        return "not checked: a program has no class to give back"
    before, attributes = bytes_of(model), outline(model)
    made = _grafted(trial, model, verify=True)
    if not untouched(model, before) or attributes != outline(model):
        raise fail("grafted", "graft changed the model that it was given")
    if isinstance(made, RewriteError):
        named = [*trial.paths, trial.step.text, *(p.rpartition("_")[0] for p in trial.paths if "_" in p)]
        if not any(name in str(made) for name in named):
            raise fail("grafted", f"it is refused without naming what stands in the way: {made}")
        return f"refused: {made}"
    if type(made) is not type(model):
        raise fail("grafted", f"a {type(model).__name__} came back as a {type(made).__name__}")
    return f"a {type(made).__name__} again"


def _grafted(trial: Trial, model: nn.Module, *, verify: bool) -> nn.Module | RewriteError:
    try:
        return graft(trial.result, model, verify=verify)
    except RewriteError as error:
        return error


def check_captured_again(trial: Trial) -> str:
    """The grafted model is captured as what it is: the same function, the same layers, nothing left to change."""
    made = None if trial.subject.model is None else _grafted(trial, trial.subject.model, verify=False)
    if not isinstance(made, nn.Module):
        return "not checked: it is not grafted"
    again = capture(made, trial.subject.args, trial.subject.kwargs, leaves=trial.step.inserts)
    compared = verify(trial.result, again)
    if not compared.same:
        raise fail("captured again", f"it is another function: {compared}")
    renamed = fit(trial.result, trial.subject.model).renamed if trial.subject.model is not None else str
    if {*again.module.state_dict()} != {renamed(name) for name in trial.result.module.state_dict()}:
        raise fail("captured again", "its state_dict has other keys")
    _same_layers(trial, again, renamed)
    try:
        left = changed_paths(trial.run(again))
    except RewriteError as error:
        left = []
        if trial.again != 0:
            raise fail("captured again", f"the pass is refused: {error}") from error
    wrong = differs_from(trial.again, left)
    if wrong:
        raise fail("captured again", f"on the captured result {wrong}")
    return f"the same function{', bit for bit' if compared.bitwise else ''}, {len(left) or 'nothing'} left to change"


def _same_layers(trial: Trial, again: Program, renamed: Callable[[str], str]) -> None:
    """The layers that the pass put in are layers again: those of torch.nn, and its own, if it says which these are.

    ``renamed`` gives the name in the user's class of a tensor of the program.
    """
    found = {str(node.target): type(layer) for node, layer in again.layers()}
    for node, layer in trial.result.layers():
        path, kind = str(node.target), type(layer)
        place = renamed(f"{path}.any").removesuffix(".any")
        if path not in trial.paths or kind.__module__.startswith("rewrite.graph.") or found.get(place) is kind:
            continue
        if kind is nn.Identity:
            continue  # a capture has no node for what computes nothing
        seen = found[place].__name__ if place in found else "no layer"
        own = not kind.__module__.startswith("torch.nn.") and kind not in trial.step.inserts
        hint = f"; announce it: {type(trial.step).__name__}.inserts = ({kind.__name__},)" if own else ""
        raise fail("captured again", f"{path} is a {kind.__name__} and is seen as {seen}{hint}")


def check_lowered(trial: Trial) -> str:
    """Each backend gives what the program gives in evaluation; where the model could be lowered, the result can.

    Where nothing of the pass is left for inference, ONNX Runtime would be given the model as it was, and is not.
    """
    expected = _run(trial.result.clone().module.eval(), trial.result)
    said = []
    for name in trial.lowerings:
        if name == "onnxruntime" and _same_inference(trial, expected):
            said.append(f"{name} is given what it was given before")
            continue
        try:
            run = lower(trial.result, name)
        except RewriteError as error:
            if _can_be_lowered(trial.program, name):
                raise fail("lowered", f"{name} takes the program before the pass and refuses it after: {error}") from error
            said.append(f"{name} not checked: it does not take the model itself")
            continue
        said.append(f"{name} {_gap(name, expected, _run(run, trial.result)):.0e}")
    return ", ".join(said)


def _same_inference(trial: Trial, expected: list[Tensor]) -> bool:
    """Whether the result for inference is the program for inference, node by node, and computes what it should."""
    before, after = (replace(p, module=evaluated(p)) for p in (trial.program, trial.result))
    return not first_difference(before, after) and all(map(torch.equal, _run(after.module, after), expected))


def _run(function: Any, program: Program) -> list[Tensor]:
    args, kwargs = copy.deepcopy((program.example_args, dict(program.example_kwargs)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(function(*args, **kwargs))


def _can_be_lowered(program: Program, backend: str) -> bool:
    try:
        lower(program, backend)
    except RewriteError:
        return False
    return True


def _gap(backend: str, expected: list[Tensor], found: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        error = relative_error(a, b)
        if error > ULPS * (torch.finfo(a.dtype).eps if a.is_floating_point() else 0):
            raise fail("lowered", f"{backend} is {error:.1e} off")
        worst = max(worst, error)
    return worst
