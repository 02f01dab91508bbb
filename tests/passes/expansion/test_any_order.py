"""The six expansions in any order: the function stays, everything trains, no two new units are alike.

A case is a chain of expansions of one model, and after each of its steps all is held: a composition of what was done until
then. `REWRITE_CASES=1000 pytest tests/passes/expansion/test_any_order.py` tries about so many compositions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewrite import Program, apply
from rewrite.passes.expansion.expand import Expand
from tests.captures import capture

from .test_expand import EPS, Model

CASES = int(os.environ.get("REWRITE_CASES", "200"))
MEAN = 4
"""How many steps a chain has on average."""
KINDS = ("ffn", "heads", "head_dim", "value_dim", "hidden", "layers")
INITS = ("normal", "zero", "orthogonal", "hadamard", "copy")


@functools.cache
def small(groups: int) -> Program:
    """A decoder of one block in float64, its weights away from 0 and 1."""
    torch.manual_seed(0)
    made = Model(EPS, groups=groups).double()
    del made.layers[1]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return capture(made, (torch.randint(0, 11, (2, 5)),))


@st.composite
def chains(draw: st.DrawFn) -> list[Expand]:
    """The six expansions in an order, cut into steps, each to some size."""
    kinds = draw(st.permutations(KINDS))
    cuts = sorted(draw(st.sets(st.integers(1, len(kinds) - 1), min_size=MEAN - 3, max_size=len(kinds) - 1)))
    steps = []
    for start, end in zip([0, *cuts], [*cuts, len(kinds)], strict=True):
        sizes = {}
        for kind in kinds[start:end]:
            more = 2 * draw(st.integers(1, 3)) if kind == "heads" else draw(st.integers(1, 9 if kind != "layers" else 2))
            sizes[kind] = f"+{more}"
        steps.append(Expand(**sizes, init=draw(st.sampled_from(INITS)), at=draw(st.sampled_from(["even", "end", "copy"]))))
    return steps


def gradients(program: Program, steps: int) -> dict[str, Tensor]:
    """The gradient of each parameter after some steps of training; softmax takes the bias of keys out."""
    module, ids = program.module, torch.randint(0, 11, (8, 9), generator=torch.Generator().manual_seed(1))
    for step in range(steps + 1):
        module.zero_grad()
        F.cross_entropy(module(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.1 * parameter.grad if step < steps else 0
    return {name: p.grad for name, p in module.named_parameters() if not name.endswith("k.bias")}


def units(program: Program) -> Iterator[Tensor]:
    """The units of each dimension but the keys', a row each: by what writes and what reads them."""
    module = program.module
    yield torch.cat([module.head.weight.T, module.words.weight.T], 1)
    for layer in module.layers.children():
        yield torch.cat([layer.up.weight, layer.down.weight.T], 1)
        yield torch.cat([layer.attention.v.weight, layer.attention.v.bias[:, None]], 1)
        yield layer.attention.q.weight


def keys(program: Program) -> Iterator[Tensor]:
    """Those of the keys, which begin as 0."""
    yield from (layer.attention.k.weight for layer in program.module.layers.children())


def differ(rows: Tensor) -> bool:
    return bool(torch.pdist(rows.detach()).min() > 0)


@settings(
    max_examples=max(1, CASES // MEAN),
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(chains(), st.sampled_from([1, 2]))
def test_any_order(chain: list[Expand], groups: int) -> None:
    program = small(groups)
    ids = torch.randint(0, 11, (8, 9), generator=torch.Generator().manual_seed(1))
    expected = program.module.eval()(ids).detach()
    for step in chain:
        program = apply(program, step, verify=False)
        found = program.module.eval()(ids).detach()
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
        assert all(map(differ, units(program)))
        trained = program.clone()
        dead = {name: int((g == 0).sum()) for name, g in gradients(trained, steps=2).items() if not g.all()}
        assert not dead
        assert all(map(differ, (*units(trained), *keys(trained))))
