"""The six expansions in any order: the function stays, everything trains, no two new units are alike.

`REWRITE_CASES=1000 pytest tests/passes/expansion/test_any_order.py` tries so many.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewrite import Program, apply, capture

from .test_expand import EPS, HEADS, Model

CASES = int(os.environ.get("REWRITE_CASES", "12"))
SIZES = {"ffn": 8, "heads": HEADS, "head_dim": 4, "value_dim": 4, "hidden": 16, "layers": 2}
INITS = ("normal", "zero", "orthogonal", "hadamard", "copy")


@functools.cache
def small(groups: int) -> Program:
    """A decoder in float64, its weights away from 0 and 1."""
    torch.manual_seed(0)
    made = Model(EPS, groups=groups).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return capture(made, (torch.randint(0, 11, (2, 5)),))


@st.composite
def pipelines(draw: st.DrawFn) -> str:
    """Each of some expansions in an order, alone or together with others, to some size."""
    kinds = draw(st.permutations(list(SIZES)))[: draw(st.integers(1, 6))]
    steps: list[list[str]] = []
    for kind in kinds:
        more = 2 * draw(st.integers(1, 3)) if kind == "heads" else draw(st.integers(1, 9 if kind != "layers" else 2))
        option = f"{kind}=+{more}"
        if steps and draw(st.booleans()):
            steps[-1].append(option)
        else:
            steps.append([option])
    init, at = draw(st.sampled_from(INITS)), draw(st.sampled_from(["even", "end", "copy"]))
    return ",".join(f"expand{{{' '.join(step)} init={init} at={at}}}" for step in steps)


def loss(program: Program, ids: Tensor) -> Tensor:
    return F.cross_entropy(program.module(ids).flatten(0, 1), ids.roll(1, 1).flatten())


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(pipelines(), st.sampled_from([1, 2]))
def test_any_order(pipeline: str, groups: int) -> None:
    before = small(groups)
    after = apply(before, pipeline, verify=False)
    ids = torch.randint(0, 11, (32, 9), generator=torch.Generator().manual_seed(1))
    expected, found = (p.module.eval()(ids) for p in (before, after))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    for step in range(4):
        after.module.zero_grad()
        loss(after, ids).backward()
        with torch.no_grad():
            for parameter in after.module.parameters():
                parameter -= 0.1 * parameter.grad if step < 3 else 0
    dead = [n for n, p in after.module.named_parameters() if not p.grad.any() and not n.endswith("k.bias")]
    assert not dead
    for layer in after.module.layers.children():
        for unit in (layer.up.weight, layer.attention.q.weight, layer.attention.v.weight, layer.attention.out.weight):
            assert torch.pdist(unit.detach()).min() > 0
