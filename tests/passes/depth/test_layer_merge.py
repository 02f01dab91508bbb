"""layer-merge: the models the kit tries it on, the cut against every other one, what it drops, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply
from rewrite.analysis.segments import LEVELS, best_segments
from tests.passes.table import Row

ROWS = [
    Row("layer-merge{speedup=1.01 latency=flops bound=9}", "TwoConvolutions", 5, again=6),
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


def choices(way: list[tuple[int, int]]) -> list[list[tuple[int, ...]]]:
    """Every choice of what to leave out of the segments of a cut."""
    sets = [[set_ for n in range(b - a + 2) for set_ in itertools.combinations(range(a, b + 1), n)] for a, b in way]
    return [[(*s, *gone) for s, gone in zip(way, those, strict=True)] for those in itertools.product(*sets)]


@pytest.mark.parametrize("drop", [False, True])
def test_the_cut_is_the_best_of_all(drop: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 4 if drop else 6
    every = [way for cut in ways(count) for way in (choices(cut) if drop else [cut])]
    segments = sorted({s for way in every for s in way})
    for _ in range(20):
        step = 1.0 / LEVELS
        times = {s: step * int(torch.randint(60, 240, (), generator=generator)) / (len(s) - 1) for s in segments}
        times = {s: step * round(seconds / step) for s, seconds in times.items()}
        errors = {s: float(torch.rand((), generator=generator)) * (s[1] - s[0] + len(s) - 2) for s in segments}
        found = best_segments(count, times, errors, 1.0)
        within = [way for way in every if sum(times[s] for s in way) <= 1.0 + step / 4]
        best = min((sum(errors[s] for s in way) for way in within), default=math.inf)
        assert (math.inf if found is None else sum(errors[s] for s in found)) == pytest.approx(best)


def test_a_budget_is_used_up_and_not_exceeded() -> None:
    def spent(times: dict[tuple[int, ...], float], budget: float) -> float:
        errors = {segment: float(len(segment) - 2) for segment in times}  # what is left out costs 1
        return sum(times[s] for s in best_segments(12, times, errors, budget) or [])

    def each(times: list[float]) -> dict[tuple[int, ...], float]:
        return {(i, i): time for i, time in enumerate(times)} | {(i, i, i): 0.0 for i in range(len(times))}

    assert spent(each([1.0] * 12), 6.0) == 6.0
    assert spent(each([0.1] * 12), 1.2 / 2) == pytest.approx(0.6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        times = torch.rand(12, generator=generator).tolist()
        assert spent(each(times), sum(times) / 1.5) <= sum(times) / 1.5


class Row1x1(nn.Module):
    """Four convolutions of size 1 with one activation for all: what becomes of them can be told by hand."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(*size, 1) for size in ((3, 4), (4, 4), (4, 6), (6, 6)))
        self.act, self.norm = act or nn.GELU(), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = self.act(conv(x))
        return self.act(self.norm(self.convs[-1](x)))  # type: ignore[no-any-return]

    def cut(self, x: Tensor, way: list[tuple[int, ...]]) -> tuple[Tensor, float, float]:
        """Its value, the sum of errors, and the multiplications a pixel of a way to cut it and to leave some out."""
        true, error, cost = x, 0.0, 0
        for first, last, *gone in way:
            kept = [i for i in range(first, last + 1) if i not in gone]
            flows = lambda value, first=first: self.act(value) if first else value  # noqa: E731
            x, own = (self._plain(flows(v) if kept else v, kept) for v in (x, true))
            for i in range(first, last + 1):
                true = self.convs[i](self.act(true) if i else true)
            error += float((own - true).norm() / true.norm())
            cost += self.convs[kept[0]].in_channels * self.convs[kept[-1]].out_channels if kept else 0
        return self.act(self.norm(x)), error, cost

    def _plain(self, x: Tensor, kept: list[int]) -> Tensor:
        for i in kept:
            x = self.convs[i](x)
        return x


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.0, 3.0])
def test_what_is_made_is_the_best_of_all_ways_to_cut_and_to_drop(speedup: float) -> None:
    model = Row1x1().eval()
    every = [way for cut in ways(4) for way in choices(cut) if not {0, 2} & {n for s in way for n in s[2:]}]
    with torch.no_grad():
        tried = [model.cut(X, way) for way in every]
        value, _, _ = min((t for t in tried if t[2] <= (12 + 16 + 24 + 36) / speedup), key=lambda t: t[1])
    program = apply(model, f"layer-merge{{speedup={speedup} latency=flops bound=99}}", args=(X,))
    assert torch.allclose(program.module.eval()(X), value, atol=1e-4)


def test_a_convolution_goes_and_one_call_of_an_activation_that_others_share() -> None:
    model = Row1x1(nn.ReLU()).eval()
    with torch.no_grad():  # the second gives what it reads, which is above 0 already
        model.convs[1] = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        nn.init.dirac_(model.convs[1].weight)  # type: ignore[arg-type]
    program = apply(model, "layer-merge{speedup=2 latency=flops}", args=(X,))
    left = [str(node.target) for node, _ in program.layers()]
    assert left == ["convs.0", "act", "convs.2", "act", "convs.3", "norm", "act"]
    assert torch.allclose(program.module.eval()(X), model(X), atol=1e-5)
    assert program.history[-1].measured[0].figures["after"] == 3
    with pytest.raises(RewriteError, match=r"out of reach: 1.00 is the most \(latency=flops, bound=0.01\)"):
        apply(model, "layer-merge{speedup=2 latency=flops drop=false bound=0.01}", args=(X,))


def test_the_first_stays_where_what_it_reads_would_be_written() -> None:
    def row(inplace: bool) -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(3, 3, 1), nn.ReLU(inplace), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)))

    step = "layer-merge{speedup=90 latency=flops bound=999}"
    gone = apply(row(inplace=False), step, args=(X,))
    assert not list(gone.layers())
    assert gone.history[-1].measured[0].figures == {"before": 3, "after": 0}
    with pytest.raises(RewriteError, match=r"out of reach: 3.00 is the most"):
        apply(row(inplace=True), step, args=(X,))


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

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y

    record = apply(Twice(), "layer-merge{latency=flops}", args=(X,)).history[-1]
    assert not record.changed
    assert record.skipped[0].reason == "a is read elsewhere too"
