"""Properties that a pass set, held as a whole: they change no output, and the gradient as the contract says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from rewrite.graph.history import Check
from rewrite.graph.program import Program
from rewrite.graph.properties import thawed
from rewrite.numerics.compare import Difference, Mode, Run, difference, run
from rewrite.numerics.probes import light_copy

from .contract import ESTIMATE, SAME, Contract
from .estimate import nearness


def properties_held(before: Program, after: Program, contract: Contract, seed: int) -> Iterator[Check]:
    """The program after, without properties and under those that changed, in each mode that counts.

    Outputs are equal bit for bit, and so are gradients for SAME: in exact arithmetic a narrower dtype would not be seen. For
    ESTIMATE they are finite, and within the contract's bounds of the true ones over all parameters. Beside others, whose
    estimates a new one may change, the outputs are equal bit for bit.
    """
    old, new = thawed(before.properties), thawed(after.properties)
    if old == new:
        return
    changed = {name: value for name, value in new.items() if value != old.get(name)}
    modes: tuple[Mode, ...] = ("eval",) if contract.evaluation_only else ("eval", "train")
    for mode in modes:
        without, within = (_run(after, properties, mode, seed) for properties in ({}, changed))
        found = difference(without, within)
        if found.buffers and contract.backward is ESTIMATE:  # some move in the backward, and with the gradient
            found = replace(found, buffers=_forward_alone(after, changed, mode, seed))
        yield Check(f"properties, {mode}", not _outputs(found), _words(found), _outputs(found))
        if contract.backward is SAME:
            held = not found.problem and not found.gradients
            yield Check(f"properties' gradient, {mode}", held, f"bit for bit, {found.gradients:.1e} apart", found.gradients)
        elif contract.backward is ESTIMATE:
            yield _near(without.gradients, within.gradients, contract, mode)
        if changed != new:
            whole = _run(after, new, mode, seed)
            every = difference(without, whole)
            words = _words(every)
            if contract.backward is ESTIMATE:
                words += f"; gradient: {_near(without.gradients, whole.gradients, contract, mode).detail}"
            yield Check(f"all properties, {mode}", not _outputs(every), words, _outputs(every))


def _forward_alone(after: Program, changed: Mapping[str, Any], mode: Mode, seed: int) -> float:
    """By how much buffers differ before anything goes backward."""
    without, within = (_run(after, each, mode, seed, gradients=False) for each in ({}, changed))
    return difference(without, within).buffers


def _run(program: Program, properties: Mapping[str, Any], mode: Mode, seed: int, *, gradients: bool = True) -> Run:
    module = light_copy(program).module
    module.assume(properties)
    return run(module, program.example_args, program.example_kwargs, mode, exact=False, seed=seed, gradients=gradients)


def _outputs(found: Difference) -> float:
    return math.inf if found.problem else max(found.outputs, found.buffers)


def _words(found: Difference) -> str:
    return found.problem or f"outputs and buffers bit for bit{'' if not _outputs(found) else ': they are not'}"


def _near(
    true: Mapping[str, torch.Tensor | None], mine: Mapping[str, torch.Tensor | None], contract: Contract, mode: str
) -> Check:
    """Relative error (root mean square) and cosine over the gradients of all parameters."""
    names = [name for name, g in true.items() if g is not None]
    a, b = (torch.cat([_flat(each.get(name)) for name in names] or [torch.zeros(0)]) for each in (true, mine))
    if a.shape != b.shape or not bool(b.isfinite().all()):
        return Check(f"properties' gradient, {mode}", False, "a gradient is gone, or is not finite")
    error, cosine = nearness(a, b)
    held = error <= contract.error_bound and cosine >= contract.cosine_bound
    return Check(
        f"properties' gradient, {mode}", held, f"relative error {error:.3g}, cosine {cosine:.4f} to the true one", error
    )


def _flat(gradient: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(0, dtype=torch.float64) if gradient is None else gradient.detach().reshape(-1).double()
