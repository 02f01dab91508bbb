"""What a rewrite costs in numbers: output error, error at each site."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from rewrite.graph.edit import Change
from rewrite.graph.history import Check
from rewrite.graph.program import Program
from rewrite.numerics.compare import run
from rewrite.numerics.probes import record_inputs


def reported(before: Program, after: Program, changes: Sequence[Change], seed: int) -> Iterator[Check]:
    """What training has to make good: the output error on the example inputs, and the worst site's."""
    args, kwargs = before.example_args, dict(before.example_kwargs)
    left = run(before.module, args, kwargs, "eval", exact=False, seed=seed, gradients=False)
    right = run(after.module, args, kwargs, "eval", exact=False, seed=seed, gradients=False)
    error = max((_mean_error(a, b) for a, b in zip(left.outputs, right.outputs, strict=True)), default=0.0)
    yield Check("output error", True, "relative, root mean square, at the example inputs", error)
    recorded = record_inputs(
        before, {c.path for c in changes if c.old is not None and _has(before, c.path)}, args, kwargs, seed
    )
    sites = {}
    for change in changes:
        if change.old is not None and change.new is not None and change.path in recorded:
            with torch.no_grad():
                inputs = recorded[change.path]
                sites[change.path] = _mean_error(
                    copy.deepcopy(change.old).eval()(*inputs), copy.deepcopy(change.new).eval()(*inputs)
                )
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
