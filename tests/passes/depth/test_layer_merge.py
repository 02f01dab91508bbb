"""layer-merge: the models the kit tries it on, the cut against every other one, what it drops, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from rewrite import RewriteError, apply
from rewrite.analysis.segments import LEVELS, best_segments
from tests.passes.table import Row

ROWS = [
    Row("layer-merge{speedup=1.01 latency=flops bound=9}", "TwoConvolutions", 5, again=10),
    Row("layer-merge{latency=flops}", "resnet18", 0),
]
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)),
        *(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 3)),
    ).eval()


def ways(count: int) -> list[list[tuple[int, int]]]:
    """Every way to cut so many layers into segments."""
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, count), n) for n in range(count))
    return [[(a, b - 1) for a, b in itertools.pairwise([0, *cut, count])] for cut in cuts]


def test_the_cut_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        every = [(i, j) for i in range(6) for j in range(i, 6)]
        step = 1.0 / LEVELS
        times = {s: step * int(torch.randint(40, 160, (), generator=generator)) for s in every}
        errors = {s: float(torch.rand((), generator=generator)) * (s[1] - s[0]) for s in every}
        found = best_segments(6, times, errors, 1.0)
        within = [way for way in ways(6) if sum(times[s] for s in way) <= 1.0 + step / 4]
        best = min((sum(errors[s] for s in way) for way in within), default=math.inf)
        assert (math.inf if found is None else sum(errors[s] for s in found)) == pytest.approx(best)


def test_what_costs_least_goes_first() -> None:
    program = apply(model(), "layer-merge{speedup=1.1 latency=flops}", args=(X,))
    kinds = [type(layer).__name__ for _, layer in program.layers()]
    assert kinds[:2] == ["Conv2d", "ReLU"]
    assert kinds.count("Conv2d") < 4
    figures = program.history[-1].measured[0].figures
    assert figures["before"] == 4
    assert float(figures["speedup"]) >= 1.1


def test_two_linear_ones_are_merged_exactly_where_that_is_enough() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    program = apply(plain, "layer-merge{speedup=1.05 latency=flops}", args=(X,))
    assert torch.allclose(program.module.eval()(X), plain(X), atol=1e-5)
    assert [type(layer).__name__ for _, layer in program.layers()] == ["Conv2d", "ReLU", "Conv2d"]


def test_measured_time_is_what_it_asks_for_by_default() -> None:
    program = apply(model(), "layer-merge{speedup=1.01 bound=9}", args=(X,))
    assert float(program.history[-1].measured[0].figures["speedup"]) >= 1.0


def test_a_speedup_out_of_reach_is_refused_with_the_one_that_is_not() -> None:
    with pytest.raises(RewriteError, match=r"speedup=50 of these convolutions is out of reach: \d"):
        apply(model(), "layer-merge{speedup=50 latency=flops}", args=(X,))


def test_what_is_read_elsewhere_is_left_with_the_reason() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y) + y

    record = apply(Twice(), "layer-merge{latency=flops}", args=(X,)).history[-1]
    assert not record.changed
    assert record.skipped[0].reason == "a is read elsewhere too"
