"""Checks of what becomes of the result: copied, saved, trained, in another dtype, without values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError
from rewrite.files.store import load, save
from rewrite.graph.program import Program

from .fresh import FreshProcess
from .observe import Observed, bytes_of, differences, first_difference, observe, projected, tensors, untouched
from .subject import cast_outputs, moved
from .trial import Trial, changed_paths, differs_from, fail

MODES = (False, True)


def check_copied(trial: Trial) -> str:
    """A deep copy does the same and shares nothing; neither does the result share with the program it came from."""
    module = trial.result.module
    made = copy.deepcopy(module)
    for other, whose in ((made, "a deep copy"), (trial.program.module, "the program before")):
        shared = next(_shared(module, other), None)
        if shared is not None:
            raise fail("copied", f"{shared} is shared with {whose}")
    before = bytes_of(module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(0)
    if not untouched(module, before):
        raise fail("copied", "writing into a deep copy changes the result")
    for train in MODES:
        _alike("copied", _observed(trial.result, train), _observed(trial.result.clone(), train))
    return "a deep copy does the same and shares nothing"


def _shared(a: nn.Module, b: nn.Module) -> Iterator[str]:
    modules = {id(m) for m in b.modules()}
    storages = {key for _, tensor in _all_tensors(b) for key in _storage(tensor)}
    yield from (f"the layer {path}" for path, m in a.named_modules() if id(m) in modules)
    yield from (f"the tensor {name}" for name, tensor in _all_tensors(a) if storages.intersection(_storage(tensor)))


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and the tensors that layers hold as plain attributes."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for path, part in module.named_modules():
        yield from ((f"{path}.{k}", v) for k, v in vars(part).items() if isinstance(v, Tensor))


def _storage(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.is_meta or not tensor.numel() else (tensor.untyped_storage().data_ptr(),)


def _observed(program: Program, train: bool) -> Observed:
    return observe(program.clone().module, program.example_args, dict(program.example_kwargs), train=train)


def _alike(check: str, expected: Observed, found: Observed) -> None:
    gaps = differences(expected, found)
    if gaps:
        raise fail(check, f"it does not do the same: {gaps[0]}")


def check_saved(trial: Trial) -> str:
    """Saved and loaded it is the same program, with its history, and does the same."""
    try:
        file = trial.file
    except RewriteError as error:
        if _can_be_saved(trial):
            raise fail("saved", f"the program could be saved before the pass, and after it not: {error}") from error
        return f"not checked: the model itself cannot be saved: {error}"
    again = load(file)
    gap = first_difference(trial.result, again)
    if gap or again.history != trial.result.history:
        raise fail("saved", f"what is loaded is another program: {gap or 'its history differs'}")
    for train in MODES:
        _alike("saved", _observed(trial.result, train), _observed(again, train))
    return f"{file.stat().st_size:,} bytes, loaded the same"


def _can_be_saved(trial: Trial) -> bool:
    try:
        save(trial.program, trial.folder / "before.pt2")
    except RewriteError:
        return False
    return True


def check_fresh(trial: Trial) -> str:
    """Loaded in a process that has seen neither the pass nor the model, the saved program does the same, bit for bit."""
    try:
        file = trial.file
    except RewriteError as error:
        return f"not checked: it cannot be saved: {error}"
    try:
        with nullcontext(trial.process) if trial.process else FreshProcess() as process:
            elsewhere = process.observed(file)
    except RuntimeError as error:
        raise fail("fresh", f"it cannot be loaded and run in a fresh process: {error}") from error
    for train in MODES:
        here = _observed(trial.result, train)
        here.structure = None
        _alike("fresh", here, elsewhere[train])
    return "the same in a fresh process"


def check_trained(trial: Trial) -> str:
    """Two steps of training: everything stays finite, and each parameter that is new, or learned before, gets a gradient."""
    before = _gradients(trial.program)
    if not any(before.values()):
        return "not checked: the model itself cannot be trained"
    new = {*_trained(trial.result.module)} - {*_trained(trial.program.module)}
    kept = {n for n in _trained(trial.result.module) if before.get(n)}
    reached: set[str] = set()
    module = trial.result.clone().module.train()
    for _ in range(2):
        gradients = _step(module, trial.result)
        bad = next((n for n, g in gradients.items() if not g.isfinite().all()), None)
        if bad:
            raise fail("trained", f"the gradient of {bad} is not finite")
        reached.update(n for n, g in gradients.items() if g.any())
    if (new | kept) - reached:
        name = min((new | kept) - reached)
        raise fail("trained", f"no gradient reaches the {'new ' * (name in new)}parameter {name} in two steps")
    return f"{len(reached)} parameters learn, {len(new)} of them new"


def _trained(module: nn.Module) -> Iterator[str]:
    return (name for name, p in module.named_parameters() if p.requires_grad)


def _gradients(program: Program) -> dict[str, bool]:
    """Every parameter that trains, and whether a gradient reaches it."""
    try:
        found = observe(program.clone().module, program.example_args, dict(program.example_kwargs), train=True)
    except RuntimeError:
        return {}
    return {name: g is not None and bool(g.any()) for name, g in found.gradients.items()}


def _step(module: nn.Module, program: Program) -> dict[str, Tensor]:
    """One step of gradient descent of unit length 1e-3; the gradients it took."""
    args, kwargs = copy.deepcopy((program.example_args, dict(program.example_kwargs)))
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = projected(tensors(module(*args, **kwargs)))
    if not loss.requires_grad:
        raise fail("trained", "no output depends on a parameter that trains")
    if not loss.isfinite():
        raise fail("trained", "the loss is not finite")
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {n: g for n, g in zip(named, found, strict=True) if g is not None}
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().clamp_min(1e-12)
    with torch.no_grad():
        for name, gradient in gradients.items():
            named[name].sub_((gradient * (1e-3 / norm)).to(gradient.dtype))
    return gradients


def check_bfloat16(trial: Trial) -> str:
    """The result can be cast as the model can, and the pass works on the model in bfloat16, parameters included."""
    expected = trial.subject.cast_outputs
    if expected is None:
        return "not checked: the model itself does not run in bfloat16"
    if trial.changes:
        _same_dtypes(expected, _cast_and_run(trial.result))
    half = trial.subject.bfloat16
    if half is None:
        return "cast; the pass itself is not checked: the model is not captured in bfloat16"
    try:
        after = trial.run(half, check="bfloat16", data=moved(trial.data, torch.bfloat16))
    except RewriteError as error:
        return f"cast; on a model in bfloat16 it is refused: {error}"
    wrong = differs_from(trial.changes, changed_paths(after))
    if wrong:
        raise fail("bfloat16", f"on the model in bfloat16 {wrong}")
    _no_other_dtypes(half, after)
    _same_dtypes(_observed(half, train=True).outputs, _observed(after, train=True).outputs)
    return "cast, and rewritten in bfloat16"


def _cast_and_run(program: Program) -> list[Tensor]:
    try:
        return cast_outputs(program)
    except Exception as error:
        raise fail("bfloat16", f"cast to bfloat16 it does not run: {type(error).__name__}: {error}") from error


def _same_dtypes(expected: list[Tensor], found: list[Tensor]) -> None:
    for before, after in zip(expected, found, strict=True):
        if before.dtype != after.dtype:
            raise fail("bfloat16", f"in bfloat16 an output is {after.dtype}, before the pass it was {before.dtype}")
        if before.isfinite().all() and not after.isfinite().all():
            raise fail("bfloat16", "in bfloat16 an output is not finite")


def _no_other_dtypes(before: Program, after: Program) -> None:
    known = {p.dtype for p in before.module.parameters()}
    for name, parameter in after.module.named_parameters():
        if parameter.dtype not in known:
            raise fail("bfloat16", f"{name} is {parameter.dtype} in a model of {', '.join(map(str, known))}")


def check_meta(trial: Trial) -> str:
    """On a model without values the pass changes the same places and makes no values; or it is refused, by name."""
    before = trial.subject.meta
    if before is None:
        return "not checked: the model is not captured on the meta device"
    data = moved(trial.data, torch.device("meta"))
    try:
        after = trial.run(before, check="meta", data=data)
    except RewriteError as error:
        return f"refused: {error}"
    wrong = differs_from(trial.changes, changed_paths(after))
    if wrong:
        raise fail("meta", f"on the meta device {wrong}")
    made = next((name for name, tensor in _all_tensors(after.module) if not tensor.is_meta), None)
    if made:
        raise fail("meta", f"{made} is no meta tensor in a model that is")
    found, expected = _shapes(after), _shapes(trial.result)
    if found != expected:
        raise fail("meta", f"on the meta device the outputs are {found}, otherwise {expected}")
    trial.run(before, check="meta", data=data, verify=True)
    return "the same places, no values"


def _shapes(program: Program) -> Any:
    args, kwargs = copy.deepcopy((program.example_args, dict(program.example_kwargs)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return [(tuple(t.shape), t.dtype) for t in tensors(program.clone().module.eval()(*args, **kwargs))]
