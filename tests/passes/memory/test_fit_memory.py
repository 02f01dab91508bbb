"""fit-memory: budgets are met as measured, without loss where that reaches, with least noise where not, or refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError
from rewrite.passes.memory.fit_memory import FitMemory
from rewrite.training.groups import grouped_bytes
from rewrite.training.inventory import Item, inventory
from rewrite.training.offload import Away
from rewrite.training.packer import Packer, Storages
from rewrite.training.planning import FRONTIER, KEEP, MASK, MOVE, RECOMPUTE, Again, Costs, Task, planned
from tests.captures import shared
from tests.passes.table import Row

ROWS = [
    Row("fit-memory", "gpt2", {"recompute"}),
    Row("fit-memory", "Frozen", 0),
]

X = torch.randn(32, 64)


class Block(nn.Module):
    """x + down(dropout(gelu(up(norm(x)))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU()
        self.drop, self.down = nn.Dropout(0.2), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.drop(self.act(self.up(self.norm(x)))))
        return found


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), Block(), Block(), nn.Linear(64, 8))


def flat() -> nn.Sequential:
    """No block and no norm, so that nothing can be computed again but an activation."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 8))


def gradients(module: nn.Module) -> list[Tensor]:
    module.train()
    torch.manual_seed(1)
    return list(torch.autograd.grad(module(X).square().sum(), list(module.parameters())))


@pytest.mark.parametrize("budget", ["0.8", "0.5", "0.25", "60KiB"])
def test_a_budget_is_met_as_measured_without_loss(budget: str) -> None:
    model = net()
    program = rewrite.apply(model, f"fit-memory{{budget={budget}}}", args=(X,))
    eager = rewrite.memory(model, (X,)).bytes
    assert rewrite.memory(program).bytes <= (60 * 1024 if budget == "60KiB" else float(budget) * eager)
    assert all(map(torch.equal, gradients(copy.deepcopy(model)), gradients(program.clone().module)))
    grafted = rewrite.graft(program, model)
    assert type(grafted) is nn.Sequential
    assert all(map(torch.equal, gradients(copy.deepcopy(model)), gradients(grafted)))


def test_where_that_does_not_reach_tensors_are_compressed() -> None:
    model = flat()
    program = rewrite.apply(model, "fit-memory{budget=0.2 min_size=64}", args=(X,))
    assert rewrite.memory(program).bytes <= 0.2 * rewrite.memory(model, (X,)).bytes
    exact, got = (torch.cat([g.flatten() for g in gradients(m)]) for m in (copy.deepcopy(model), program.module))
    assert 0 < float((got - exact).norm() / exact.norm()) < 0.3
    assert {"8 bits", "4 bits"} & {row.figures.get("choice") for row in program.history[-1].measured}
    with pytest.raises(RewriteError, match=r"the smallest is .* bytes, 1\.000 of eager"):
        rewrite.apply(model, "fit-memory{budget=0.2 min_size=64 lossy=false}", args=(X,))


def test_a_budget_that_cannot_be_met_is_refused_with_the_smallest_that_can() -> None:
    with pytest.raises(RewriteError, match=r"cannot be met: the smallest is [\d,]+ bytes, 0\.\d+ of eager"):
        rewrite.apply(flat(), "fit-memory{budget=0.01 min_size=64}", args=(X,))


def test_what_fits_already_is_left_alone() -> None:
    (record,) = rewrite.apply(net(), "fit-memory{budget=4GiB}", args=(X,)).history
    assert not record.changed
    assert "within the budget of 4,294,967,296" in record.skipped[0].reason


@pytest.mark.parametrize("budget", ["0", "1.5", "4XB", "-1", "many"])
def test_what_is_no_budget_is_refused(budget: str) -> None:
    with pytest.raises(RewriteError, match=r"is 0\.25 or 4GiB"):
        FitMemory(budget=budget)


@pytest.mark.parametrize("name", ["gpt2", "vit", "llama"])
def test_an_inventory_is_all_that_memory_counts(name: str) -> None:
    program = shared(name)
    assert sum(item.bytes for item in inventory(program)) == rewrite.memory(program).bytes


def item(name: str, numbers: int, maker: str = "", *, mask: bool = False) -> Item:
    return Item((name, 0), name, name, 4 * numbers, numbers, not mask, mask, maker)


def task(noise: dict[str, float]) -> Task:
    """Two tensors that layers can compute again, one that only rounding makes smaller, a mask."""
    items = [item("a", 1000, "cheap"), item("b", 1000, "dear"), item("c", 1000), item("d", 1000, mask=True)]
    costs = Costs({8: 1e-9, 4: 1e-9}, 1e-4, None, {(name, 0): value for name, value in noise.items()})
    layers = {"cheap": Again("cheap", 1.0), "dear": Again("dear", 9.0)}
    return Task(items, layers, {}, {}, costs, 256, 64)


def test_plans_by_hand() -> None:
    """Lossless and fastest: the mask first (4000 to 125 bytes), then the cheap layer, then the dear one; then rounding."""
    given = task({"a": 5.0, "b": 5.0, "c": 1.0})
    assert planned(given, 16000).choices == [KEEP] * 4
    assert planned(given, 12125).choices == [KEEP, KEEP, KEEP, MASK]
    assert planned(given, 8125).choices == [RECOMPUTE, KEEP, KEEP, MASK]
    assert planned(given, 4125).choices == [RECOMPUTE, RECOMPUTE, KEEP, MASK]
    assert planned(given, 2000).choices == [RECOMPUTE, RECOMPUTE, "8 bits", MASK]
    assert planned(given, 700).choices == [RECOMPUTE, RECOMPUTE, "4 bits", MASK]
    with pytest.raises(RewriteError, match="the smallest is 669 bytes"):
        planned(given, 100)


def test_what_a_block_is_computed_again_from_can_be_compressed_too() -> None:
    """Two tensors of 4000 bytes in a block that is given 500 numbers: without loss 2000, then what 8 and 4 bits take."""
    items, noise = [item("a", 1000), item("b", 1000)], {("a", 0): 5.0, ("b", 0): 2.0}
    costs = Costs({8: 1e-9, 4: 1e-9}, 1e-4, None, noise)
    blocks, inside = {"block": Again("block", 1.0, 2000, 500)}, {"a": "block", "b": "block"}
    given = Task(items, {}, blocks, inside, costs, 256, 64)
    exact = planned(given, 2000)
    assert (exact.choices, exact.blocks, exact.bytes, exact.noise) == ([RECOMPUTE] * 2, {"block": KEEP}, 2000, 0)
    for budget, bits in ((600, 8), (400, 4)):
        plan = planned(given, budget)
        assert (plan.choices, plan.blocks) == ([RECOMPUTE] * 2, {"block": f"{bits} bits"})
        assert plan.bytes == grouped_bytes(500, bits, 256, torch.float32)
        assert plan.noise == pytest.approx(7.0 / (2**bits - 1) ** 2)


def test_on_a_device_a_tensor_can_wait_on_the_host() -> None:
    """At 1 second a byte moving is dearer than any layer, and has no loss as rounding has."""
    given = task({"a": 5.0, "b": 5.0, "c": 1.0})
    given = replace(given, costs=replace(given.costs, moving=1.0))
    assert planned(given, 2000).choices == [RECOMPUTE, RECOMPUTE, MOVE, MASK]
    packer = Packer(Storages(frozenset()), {"bits": [-1, 0], "group": 256, "rounding": "nearest", "min_size": 1})
    tensors = torch.randn(6, 8).t(), torch.randn(6, 8)
    moved, kept = map(packer.pack, tensors)
    assert type(moved.storage) is Away
    assert moved.storage.storage.data_ptr() != tensors[0].data_ptr()
    assert torch.equal(packer.unpack(moved), tensors[0])
    assert kept is tensors[1]


class Odd(nn.Module):
    """Keeps complex numbers and integers for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.filter = nn.Linear(64, 64), nn.Parameter(torch.randn(33))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).tanh()
        spectrum = torch.fft.rfft(y) * self.filter
        found: Tensor = torch.fft.irfft(spectrum) + y.gather(1, y.argsort(1))
        return found


def test_what_cannot_be_compressed_is_named() -> None:
    program = rewrite.apply(Odd(), "fit-memory{budget=0.9 min_size=64}", args=(X,), verify=False)
    choices = {row.figures.get("tensor"): row.figures.get("choice") for row in program.history[-1].measured}
    assert choices["mul"] == "keep: complex64 is not compressed"
    assert choices["argsort"] == "keep: int64 is not compressed"
    (record,) = rewrite.apply(Odd(), "compress-activations{min_size=64}", args=(X,), verify=False).history
    assert [skip.reason for skip in record.skipped] == [
        "mul keeps 8,448 bytes: complex64 is not compressed",
        "argsort keeps 16,384 bytes: int64 is not compressed",
    ]


def test_the_frontier_is_reported_and_falls() -> None:
    program = rewrite.apply(flat(), "fit-memory{budget=0.2 min_size=64}", args=(X,), verify=False)
    plans = [row.figures for row in program.history[-1].measured if row.path == "frontier"]
    kept = [float(plan["kept"]) for plan in plans]
    assert kept == sorted(kept, reverse=True)
    assert len(kept) >= 3
    assert kept[0] <= FRONTIER[0]
    assert float(plans[-1]["noise"]) > float(plans[0]["noise"])
