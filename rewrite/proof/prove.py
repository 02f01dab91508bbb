"""The proof of a pass: what its contract promises, checked on the programs before and after it."""

from __future__ import annotations

import copy
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from rewrite.errors import RewriteError
from rewrite.graph.edit import Change, Fakes, fake_value
from rewrite.graph.history import Check, Verification
from rewrite.graph.nodes import tensor_value
from rewrite.graph.program import LayerGraph, Program
from rewrite.numerics.compare import TOLERANCE, Difference, Mode, difference, run
from rewrite.pipeline.pass_ import Pass

from .contract import CLOSE, NEW, SAME
from .formula import formula_error

Rerun = Callable[..., tuple[Program, Any]]
_MODES: tuple[Mode, ...] = ("eval", "train")


class VerificationError(RewriteError):
    """A pass broke its word. ``bundle`` is the folder that holds what is needed to look into it."""

    bundle: Path | None = None

    @classmethod
    def of(cls, before: Program, after: Program, step: Pass, verification: Verification, seed: int, folder: Path
           ) -> VerificationError:
        """The error for a failed verification, with its crash bundle written below ``folder``."""
        worst = verification.failures[0]
        bundle = write_crash_bundle(before, after, step, verification, seed, folder)
        where = f"; see {bundle}" if bundle else ""
        made = cls(f"pass {step.text} broke its contract ({step.contract()}): {worst.name}: {worst.detail}{where}")
        made.bundle = bundle
        return made


def prove(before: Program, after: Program, changes: Sequence[Change], step: Pass, seed: int, *, data: Any, rerun: Rerun,
          changed: bool = True) -> Verification:
    """Check everything that ``step`` promises for ``before -> after``; nothing of either is changed.

    ``changed`` is whether the two differ at all: a difference that no edit accounts for is a failure.
    """
    began = time.perf_counter()
    contract = step.contract()
    checks = list(_structure(before, after, changes))
    if changed and not changes:
        checks.append(Check("journal", False, "the program changed without an edit"))
    if not all(check.passed for check in checks):
        return Verification(tuple(checks), time.perf_counter() - began, seed)
    if any(t.is_meta for t in [*before.module.parameters(), *before.module.buffers()]):
        checks.append(Check("values", True, "not checked: the tensors are on the meta device"))
        return Verification(tuple(checks), time.perf_counter() - began, seed)
    if changes:
        probe = perturbed(before, seed)
        rewritten, context = rerun(probe, step, seed=seed, data=data)
        args, kwargs = fresh_inputs(before.example_args, before.example_kwargs, seed)
        if contract.forward is SAME and contract.backward is SAME:
            checks += _same(probe, rewritten, args, kwargs, seed)
        if contract.forward in (CLOSE, NEW):
            checks += _undo(probe, rewritten, context.edit.changes, args, kwargs, seed)
            checks += _formula(rewritten, context.edit.changes, step, args, kwargs, seed)
            checks += _reported(before, after, changes, seed)
    return Verification(tuple(checks), time.perf_counter() - began, seed)


def _structure(before: Program, after: Program, changes: Sequence[Change]) -> Iterator[Check]:
    after.graph.lint()
    yield Check("graph", True, "lint")
    yield _check_values(after)
    old, new = _output_values(before), _output_values(after)
    yield Check("outputs", old == new, "shapes and dtypes" if old == new else f"{new} instead of {old}")
    same = before.module.interface.signature == after.module.interface.signature
    yield Check("signature", same)
    yield _ties(before, after, changes)
    yield _state(before, after, changes)


def _check_values(program: Program) -> Check:
    """Propagate FakeTensors anew and compare with the values that the nodes carry."""
    values: dict[Node, Any] = {}
    known: Fakes = {}
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            values[node] = node.meta.get("val")
        elif node.op != "output":
            carried = tensor_value(node)
            if "provenance" not in node.meta and not any(n.meta.get("provenance") for n in node.all_input_nodes):
                values[node] = node.meta.get("val")
                continue
            try:
                values[node] = fake_value(program.module, node, values, known)
            except Exception:
                if "provenance" in node.meta:
                    raise
                values[node] = node.meta.get("val")  # an operator that dynamic sizes defeat, as recurrent ones do
            if carried is not None and _described(values[node]) != _described(carried):
                return Check("values", False, f"{node.name} gives {_described(values[node])}, "
                                              f"its metadata says {_described(carried)}")
    return Check("values", True, "FakeTensor shapes and dtypes")


def _described(value: Any) -> str:
    return f"{tuple(str(s) for s in value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)


def _output_values(program: Program) -> list[str]:
    outputs = program.graph.output_node().args[0]
    return [_described(n.meta.get("val")) if isinstance(n, Node) else repr(n) for n in pytree.tree_leaves(outputs)]


def _edited_paths(program: Program, changes: Sequence[Change]) -> set[str]:
    """The paths that edits name, and every other name of the modules and tensors there."""
    module = program.module
    named = [*module.named_modules(remove_duplicate=False), *module.named_parameters(remove_duplicate=False),
             *module.named_buffers(remove_duplicate=False)]
    paths = {c.path for c in changes if c.path}
    touched = {id(thing) for name, thing in named if name in paths}
    return paths | {name for name, thing in named if id(thing) in touched}


def _edited(name: str, paths: set[str]) -> bool:
    """Whether a name lies at or below one of the paths."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in paths for i in range(1, len(parts) + 1))


def _ties(before: Program, after: Program, changes: Sequence[Change]) -> Check:
    paths = _edited_paths(after, changes)
    lost = [group for group in _tied(before.module) - _tied(after.module)
            if not any(_edited(name, paths) for name in group)]
    return Check("tied weights", not lost, "" if not lost else f"{sorted(lost[0])} are no longer one tensor")


def _tied(module: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _state(before: Program, after: Program, changes: Sequence[Change]) -> Check:
    """Keys that came or went, and tensors that changed, must lie under edited paths; the rest is kept bit for bit."""
    paths = _edited_paths(after, changes)
    old, new = before.module.state_dict(), after.module.state_dict()
    unexplained = [k for k in old.keys() ^ new.keys() if not _edited(k, paths)]
    if unexplained:
        return Check("kept", False, f"state_dict key {unexplained[0]} has no edit that explains it")
    kept = [k for k in old if k in new and not _edited(k, paths)]
    moved = [k for k in kept if not same_bytes(old[k], new[k])]
    return Check("kept", not moved, f"{len(kept)} tensors bit for bit" if not moved else f"{moved[0]} changed")


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values (NaN equals NaN); on the meta device, the same shape."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.is_meta or torch.equal(a, b) or bool(torch.equal(a.isnan(), b.isnan())
                                                  and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _same(before: Program, after: Program, args: Any, kwargs: Any, seed: int) -> Iterator[Check]:
    """Both in exact arithmetic, in both modes: outputs, gradients of kept parameters, buffers."""
    for mode in _MODES:
        gap = _difference(before, after, args, kwargs, mode, seed, exact=True)
        own = _difference(before, after, args, kwargs, mode, seed, exact=False)
        yield Check(f"same {mode}", gap.largest <= TOLERANCE, _words(gap) + f"; in the model's dtype {_words(own)}",
                    gap.largest)


def _difference(before: Program, after: Program, args: Any, kwargs: Any, mode: Mode, seed: int, *, exact: bool
                ) -> Difference:
    try:
        left = run(before.module, args, kwargs, mode, exact=exact, seed=seed)
    except RuntimeError:  # its own backward fails: what it computes is still compared
        left = run(before.module, args, kwargs, mode, exact=exact, seed=seed, gradients=False)
        right = run(after.module, args, kwargs, mode, exact=exact, seed=seed, gradients=False)
        return replace(difference(left, right), note="gradients not compared: the input's own backward fails")
    return difference(left, run(after.module, args, kwargs, mode, exact=exact, seed=seed))


def _words(gap: Difference) -> str:
    if gap.problem:
        return gap.problem
    figures = f"outputs {gap.outputs:.1e}, gradients {gap.gradients:.1e}, buffers {gap.buffers:.1e}"
    return f"{figures}; {gap.note}" if gap.note else figures


def _undo(before: Program, after: Program, changes: Sequence[Change], args: Any, kwargs: Any, seed: int
          ) -> Iterator[Check]:
    """With every replaced layer put back, the program must be the input again, bit for bit."""
    undone = put_back(after, changes)
    for mode in _MODES:
        gap = _difference(before, undone, args, kwargs, mode, seed, exact=False)
        yield Check(f"undo {mode}", gap.largest == 0, _bitwise(gap), gap.largest)


def _bitwise(gap: Difference) -> str:
    return _words(gap) if gap.largest or gap.note else "bit for bit"


def put_back(after: Program, changes: Sequence[Change]) -> Program:
    """A copy of ``after`` in which each replaced layer is the old one again."""
    replaced = [c for c in changes if c.kind == "replace layer"]
    other = next((c for c in changes if c.kind != "replace layer"), None)
    if other is not None:
        raise NotImplementedError(f"a {other.kind} cannot be put back yet")
    memo: dict[int, Any] = {}
    module = copy.deepcopy(after.module, memo)
    for change in reversed(replaced):
        _set_layer(module, change.path, copy.deepcopy(change.old, memo))
    return replace(after, module=module)


def _set_layer(module: LayerGraph, path: str, layer: nn.Module | None) -> None:
    assert layer is not None
    current = module.get_submodule(path)
    for holder in module.modules():
        for name, child in holder._modules.items():
            if child is current:
                holder._modules[name] = layer


def _formula(after: Program, changes: Sequence[Change], step: Pass, args: Any, kwargs: Any, seed: int
             ) -> Iterator[Check]:
    """Each inserted layer against the pass's own formula, on the site's recorded input, in float64, gradient too."""
    recorded = record_inputs(after, {c.path for c in changes if c.new is not None}, args, kwargs, seed)
    worst, where = 0.0, ""
    for change in changes:
        if change.new is None:
            continue
        error = formula_error(step, change, recorded[change.path])
        if error >= worst:
            worst, where = error, change.path
    yield Check("formula", worst <= TOLERANCE, f"{len(recorded)} layers, worst at {where}", worst)


def record_inputs(program: Program, paths: set[str], args: Any, kwargs: Any, seed: int
                  ) -> dict[str, tuple[torch.Tensor, ...]]:
    """The tensors that the layers at ``paths`` are called with, in one evaluation run (the last call counts)."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    module = copy.deepcopy(program.module).eval()
    for path in paths:
        def hook(layer: nn.Module, inputs: Any, path: str = path) -> None:
            found[path] = tuple(t.detach().clone() for t in inputs if isinstance(t, torch.Tensor))

        module.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    return found


def _reported(before: Program, after: Program, changes: Sequence[Change], seed: int) -> Iterator[Check]:
    """What training has to make good: the output error on the example inputs, and the worst site's."""
    args, kwargs = before.example_args, dict(before.example_kwargs)
    left = run(before.module, args, kwargs, "eval", exact=False, seed=seed, gradients=False)
    right = run(after.module, args, kwargs, "eval", exact=False, seed=seed, gradients=False)
    error = max((_mean_error(a, b) for a, b in zip(left.outputs, right.outputs, strict=True)), default=0.0)
    yield Check("output error", True, "relative, root mean square, at the example inputs", error)
    recorded = record_inputs(before, {c.path for c in changes if c.old is not None and _has(before, c.path)}, args,
                             kwargs, seed)
    sites = {}
    for change in changes:
        if change.old is not None and change.new is not None and change.path in recorded:
            with torch.no_grad():
                inputs = recorded[change.path]
                sites[change.path] = _mean_error(copy.deepcopy(change.old).eval()(*inputs),
                                                 copy.deepcopy(change.new).eval()(*inputs))
    if sites:
        worst = max(sites, key=lambda p: sites[p])
        yield Check("site error", True, f"relative, worst at {worst}", sites[worst])


def _has(program: Program, path: str) -> bool:
    return any(n.op == "call_module" and n.target == path for n in program.graph.nodes)


def _mean_error(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.is_floating_point() or a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))


def perturbed(program: Program, seed: int) -> Program:
    """A copy in which parameters that are all zero or all one are random: they would hide errors."""
    made = program.clone()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.module.parameters():
        first = parameter.detach().reshape(-1)[:1]
        if parameter.is_floating_point() and parameter.numel() and first.item() in (0.0, 1.0) \
                and bool((parameter == first).all()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            with torch.no_grad():
                parameter.copy_(parameter + noise.to(parameter))
    return made


def fresh_inputs(args: Any, kwargs: Any, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """New inputs in each example's domain: floats by mean and deviation, integers permuted, masks permuted by row."""
    generator = torch.Generator().manual_seed(seed + 1)

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.numel() == 0 or value.is_meta:
            return value
        if value.is_floating_point():
            if value.dim() == 0 or _is_mask(value):
                return value.clone()
            wide = value.double()
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            deviation = wide.std() if value.numel() > 1 else 0.0
            return (wide.mean() + noise * deviation).to(value.dtype)
        if _is_mask(value):
            return _rows_permuted(value, generator)
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.reshape(-1)[order].reshape(value.shape)

    made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(fresh, (tuple(args), dict(kwargs)))
    return made


def _is_mask(value: torch.Tensor) -> bool:
    return value.dtype is torch.bool or bool(((value == 0) | (value == 1)).all())


def _rows_permuted(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if value.dim() == 0:
        return value.clone()
    order = torch.randperm(value.shape[-1], generator=generator).to(value.device)
    return value[..., order]


_bundles = itertools.count()


def write_crash_bundle(before: Program, after: Program, step: Pass, verification: Verification, seed: int, folder: Path
                       ) -> Path | None:
    """Write pipeline text, both graphs, the checks, seeds and versions to a new folder; None if it cannot be made."""
    path = folder / f"crash-{step.name}-{time.strftime('%Y%m%d-%H%M%S')}-{next(_bundles)}"
    history = ",".join([*(r.text for r in before.history), step.text])
    facts = {"pipeline": history, "pass": step.text, "seed": seed, "torch": torch.__version__,
             "python": platform.python_version(), "model": before.origin.model_class,
             "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail, "error": str(c.error)}
                        for c in verification.checks]}
    try:
        path.mkdir(parents=True)
        (path / "pipeline.txt").write_text(history + "\n")
        (path / "before.py").write_text(before.module.code)
        (path / "after.py").write_text(after.module.code)
        (path / "bundle.json").write_text(json.dumps(facts, indent=2))
    except OSError:
        return None
    return path
