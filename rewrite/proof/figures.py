"""What a rewrite costs in numbers: output error, error at each site."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rewrite.graph.edit import Change
from rewrite.graph.history import Check
from rewrite.graph.program import Program
from rewrite.numerics.probes import Watcher, watch


def reported(before: Program, after: Program, changes: Sequence[Change], seed: int) -> Iterator[Check]:
    """What training has to make good: the output error on the example inputs, and the worst site's."""
    args, kwargs = before.example_args, dict(before.example_kwargs)
    sites: dict[str, float] = {}
    called = {str(n.target) for n in before.graph.nodes if n.op == "call_module"}
    watchers = {
        c.path: _watcher(sites, c.path, c.new)
        for c in changes
        if c.old is not None and c.new is not None and c.path in called
    }
    left = watch(before, watchers, args, kwargs, seed)
    right = watch(after, {}, args, kwargs, seed)
    error = max((_mean_error(a, b) for a, b in zip(left, right, strict=True)), default=0.0)
    yield Check("output error", True, "relative, root mean square, at the example inputs", error)
    if sites:
        worst = max(sites, key=lambda p: sites[p])
        yield Check("site error", True, f"relative, worst at {worst}", sites[worst])


def _watcher(sites: dict[str, float], path: str, new: nn.Module) -> Watcher:
    layer = copy.deepcopy(new).eval()

    def seen(inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        sites[path] = max(sites.get(path, 0.0), _mean_error(output, layer(*inputs)))

    return seen


def _mean_error(a: Any, b: Any) -> float:
    if not isinstance(a, torch.Tensor) or not a.is_floating_point() or a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))
