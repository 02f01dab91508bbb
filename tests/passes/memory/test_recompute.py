"""recompute: the models the kit tries it on, the bytes it takes away, and that nothing else changes, wherever it lives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.training.regions import checkpointed
from tests.captures import capture, shared
from tests.passes.table import Row

NORMS = "recompute{where=type:*Norm*|type:*Activation*}"

ROWS = [
    Row("recompute", "gpt2", {"recompute"}, near_miss={"h.0.ln_1": "it is computed again with the region around it"}),
    Row(NORMS, "llama", {"recompute"}, near_miss={"layers.0": "not selected"}),
    Row("recompute{where=layer1.*}", "resnet18", {"recompute"}),
    Row("recompute", "Frozen", 0),
]

X = torch.randn(6, 24)


class Block(nn.Module):
    """x + down(dropout(gelu(up(norm(x))))), and statistics of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU()
        self.drop, self.down, self.batch = nn.Dropout(0.2), nn.Linear(40, 24), nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.batch(self.down(self.drop(self.act(self.up(self.norm(x))))))
        return found


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), Block(), Block(), nn.LayerNorm(24), nn.Linear(24, 4))


def step(module: nn.Module) -> list[Tensor]:
    """Outputs, gradients and buffers of two steps with different random numbers."""
    module.train()
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        y = module(X)
        found += [y.detach(), *torch.autograd.grad(y.square().sum(), list(module.parameters()))]
    return [*found, *(b.clone() for b in module.buffers()), torch.rand(3)]


@pytest.mark.parametrize("text", ["recompute", "recompute{where=type:*Norm*|type:GELU}", "recompute{where=1.norm|2}"])
def test_it_is_the_same_bit_for_bit_in_every_form(text: str, tmp_path: Path) -> None:
    model = net()
    program = rewrite.apply(model, text, args=(X,))
    wanted, before, after = step(copy.deepcopy(model)), rewrite.memory(model, (X,)), rewrite.memory(program)
    grafted = rewrite.graft(program, model)
    torch.save(grafted, tmp_path / "net.pt")
    forms: dict[str, nn.Module] = {
        "the program": program.clone().module,
        "deeply copied": copy.deepcopy(program.module),
        "loaded": rewrite.load(rewrite.save(program, tmp_path / "net.pt2")).module,
        "pickled": torch.load(tmp_path / "net.pt", weights_only=False),
        "compiled": torch.compile(copy.deepcopy(grafted), backend="aot_eager"),
        "the program, compiled": torch.compile(program.clone().module, backend="aot_eager"),
    }
    for name, module in forms.items():
        assert all(map(torch.equal, wanted, step(module))), name
    assert after.bytes < before.bytes
    assert rewrite.memory(capture(grafted, (X,))).bytes == after.bytes
    assert all(map(torch.equal, wanted, step(grafted)))


def test_a_block_keeps_what_it_is_given_alone() -> None:
    program = rewrite.apply(net(), "recompute{where=re:^[12]$}", args=(X,))
    kept = rewrite.memory(program).kept
    assert [(each.path, each.kind, each.bytes) for each in kept[:2]] == [
        ("1", "recompute", 6 * 24 * 4),
        ("2", "recompute", 6 * 24 * 4),
    ]
    assert {each.path for each in kept[2:]} == {"3", "4"}


def test_a_norm_and_an_activation_keep_their_input_for_their_result() -> None:
    """Of 24 + 24 numbers a row around a norm 24 stay, of 40 + 40 around GELU and dropout 40 for the mask and 40 twice."""
    program = rewrite.apply(net(), "recompute{where=1.norm|2.norm|3}", args=(X,))
    assert rewrite.memory(net(), (X,)).bytes - rewrite.memory(program).bytes == 3 * 6 * 24 * 4


def test_it_goes_with_compression() -> None:
    """What stays is compressed; the gradient is as near as without."""
    model = net()
    both = rewrite.apply(model, "compress-activations{min_size=64},recompute{where=type:*Norm*|type:GELU}", args=(X,))
    other = rewrite.apply(model, "recompute{where=type:*Norm*|type:GELU},compress-activations{min_size=64}", args=(X,))
    alone = rewrite.apply(model, "compress-activations{min_size=64}", args=(X,))
    sizes = [rewrite.memory(each).bytes for each in (both, other)]
    assert max(sizes) < rewrite.memory(alone).bytes
    wanted = step(copy.deepcopy(model))
    for program in (both, other):
        found = step(program.clone().module)
        assert torch.equal(found[0], wanted[0])
        first, exact = (torch.cat([g.flatten() for g in each[1:15]]) for each in (found, wanted))
        assert 0 < float((first - exact).norm() / exact.norm()) < 0.05


def test_under_autocast_it_is_the_same_bit_for_bit() -> None:
    model = net()
    program = rewrite.apply(model, "recompute{where=type:*Norm*|type:GELU}", args=(X,))
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = step(copy.deepcopy(model)), step(program.clone().module)
    assert all(map(torch.equal, wanted, found))


def test_a_second_backward_computes_it_once_more() -> None:
    module = rewrite.apply(net(), "recompute{where=type:*Norm*|type:GELU}", args=(X,)).module.eval()
    y = module(X).square().sum()
    first, second = (torch.autograd.grad(y, list(module.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_statistics_count_once_and_the_mode_is_that_of_the_forward() -> None:
    """A BatchNorm is computed again with the statistics of the batch, though the model is in evaluation by then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24), Block(), nn.Linear(24, 4))
    model[3].drop.p = 0.0
    module = rewrite.apply(model, "recompute{where=1|3}", args=(X,)).module
    found = []
    for each in (copy.deepcopy(model), module):
        y = each.train()(X).square().sum()
        each.eval()
        found.append([*torch.autograd.grad(y, list(each.parameters())), *(b.clone() for b in each.buffers())])
    assert all(map(torch.equal, *found))
    assert int(found[0][-1]) == int(found[0][-4]) == 1


class Writing(nn.Module):
    """Writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(x.add_(1))
        return found


class Cache:
    """What came so far: each call adds to it, and attends to all of it."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def added(self, x: Tensor) -> Tensor:
        self.rows.append(x)
        return torch.cat(self.rows)


def test_a_cache_is_added_to_once() -> None:
    """A second forward is given it as it was before the first, with the tensors themselves; so is a third."""
    first, w = torch.randn(2, 4), torch.randn(4, 4, requires_grad=True)

    def forward(x: Tensor, *, cache: Cache) -> Tensor:
        return cache.added(x @ w).tanh().sum(0)

    found, caches = [], [Cache(), Cache()]
    for run, cache in zip((forward, checkpointed(forward, [])), caches, strict=True):
        cache.rows.append(first)
        y = run(X[:, :4], cache=cache).square().sum()
        found += [torch.autograd.grad(y, w, retain_graph=True)[0] for _ in range(2)]
    assert all(torch.equal(found[0], each) for each in found)
    assert [len(cache.rows) for cache in caches] == [2, 2]
    assert all(cache.rows[0] is first for cache in caches)


def test_what_cannot_run_twice_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(24, 24), Writing(), nn.SiLU(inplace=True), nn.LayerNorm(24))
    (record,) = rewrite.apply(model, "recompute", args=(X,)).history
    assert not record.changed
    reasons = {s.path: s.reason for s in record.skipped}
    assert reasons["1"] == "it writes into _0, which it was given"
    assert (reasons["2"], reasons["3"]) == ("it writes in place", "nothing keeps its result")


def test_for_inference_nothing_is_left_of_it(tmp_path: Path) -> None:
    program = rewrite.apply(net(), "recompute", args=(X,))
    lowered: Any = rewrite.lower(program)
    assert not lowered.module.properties
    read = torch.export.load(rewrite.save(program, tmp_path / "net.pt2"))
    assert torch.equal(read.module()(X), program.module.eval()(X))


@pytest.mark.parametrize("name", ["bert", "t5", "convnext_atto"])
def test_blocks_of_other_models(name: str) -> None:
    program = shared(name)
    made = rewrite.apply(program, "recompute")
    assert rewrite.memory(made).bytes < 0.6 * rewrite.memory(program).bytes
