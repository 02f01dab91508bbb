"""Packing in compiled graphs: bytes by the closed form, the compiled forward, gradients near, what is left to eager mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.training.groups import drawn_by, grouped, grouped_bytes, restored
from rewrite.training.heads import is_apart
from rewrite.training.inlined import Eager, hooks, packing_by, plan_of, scattered
from rewrite.training.packer import Packer, Storages, View
from rewrite.training.packing import packed_bytes
from rewrite.training.saved import kept_bytes
from tests.passes.memory.test_compress_activations import error, gradients

X = torch.randn(32, 64)
VALUE: dict[str, Any] = {"bits": 8, "group": 64, "rounding": "nearest", "min_size": 1}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Dropout(0.5), nn.Linear(256, 8))


def compiled(module: nn.Module, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(module, backend="aot_eager", **options)


@pytest.mark.parametrize("options", ["", "bits=4 groups=heads", "format=fp8 group=16"])
def test_compiled_graphs_keep_packed_numbers(options: str) -> None:
    """What tanh and dropout give, 8 bits each, and dropout's mask in one; the forward is that of eager mode."""
    model = net()
    exact = gradients(model, X)
    program = rewrite.apply(model, f"compress-activations{{{options}}}", args=(X,), verify=False)
    grafted = rewrite.graft(program, model) if not options else None
    for module in filter(None, (program.module, grafted)):
        run = compiled(module)
        made = gradients(run, X)
        assert 0 < error(exact, made) < (0.02 if not options else 0.2)
        assert all(map(torch.equal, made, gradients(run, X)))
        assert not torch.equal(made[0], gradients(run, X, seed=2)[0])
        outputs = []
        for each in (model, run):
            torch.manual_seed(3)
            outputs.append(each(X))
        assert torch.equal(*outputs)
        if module is program.module and not options:
            count = 32 * 256
            wanted = 2 * grouped_bytes(count, 8, 256, torch.float32) + packed_bytes(count, 1)
            assert kept_bytes(program.module, ((X,), {}), run) == wanted


def test_any_size_and_any_layout() -> None:
    """One graph for all sizes; maps whose channels lie last come back as they lay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.Flatten(1), nn.Tanh())
    x = torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last)
    program = rewrite.apply(model, "compress-activations{min_size=64}", args=(x,), verify=False)
    run = compiled(program.module, dynamic=True)
    for size in (4, 6):
        given = torch.randn(size, 3, 9, 9).to(memory_format=torch.channels_last)
        assert error(gradients(copy.deepcopy(model), given), gradients(run, given)) < 0.05


class Joint(nn.Module):
    """q ∘ k of one projection, each a part of its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.both(x).chunk(2, -1)
        return q * k


def test_parts_of_a_storage_are_packed_each_by_itself() -> None:
    model = Joint()
    program = rewrite.apply(model, "compress-activations{min_size=64 rounding=nearest}", args=(X,), verify=False)
    run = compiled(program.module)
    assert 0 < error(gradients(model, X), gradients(run, X)) < 0.01
    assert kept_bytes(program.module, ((X,), {}), run) == 2 * grouped_bytes(32 * 64, 8, 256, torch.float32)
    assert [is_apart(t) for t in (X[:, :3], X.t()[2:], X[:1].expand(4, 64), X[None])] == [True, True, False, True]


def test_what_is_left_to_eager_mode_is_packed_as_there() -> None:
    pack, unpack = hooks(plan_of(VALUE))
    assert hooks(plan_of(dict(VALUE)))[0] is pack
    parameter = nn.Parameter(torch.randn(64))
    with packing_by(Packer(Storages.of(nn.ParameterList([parameter]), []), VALUE)):
        packed, own = pack(X), pack(parameter)
    assert type(packed) is type(own) is Eager
    assert type(packed.kept) is View
    assert own.kept is parameter
    assert bool(((unpack(packed) - X).abs() < 0.05).all())
    assert torch.equal(unpack(own), parameter)


def test_bits_of_single_tensors_hold_in_eager_mode_alone() -> None:
    assert [plan_of({**VALUE, "bits": bits}).bits for bits in (4, [4, 0], [0, -1], [])] == [4, 8, 0, 0]


def test_a_hash_rounds_without_bias() -> None:
    """Over many seeds u is even on [0, 1) for each number, whatever it is, and the mean of what is restored the number."""
    rows = torch.cat([torch.zeros(32), torch.randn(224)])[None]
    draws = torch.stack([scattered(torch.tensor(seed * 7919))(rows) for seed in range(4000)])
    assert bool(((draws >= 0) & (draws < 1)).all())
    assert bool(((draws.mean(0) - 0.5).abs() < 5 * (1 / 12 / 4000) ** 0.5).all())
    assert torch.corrcoef(draws[:, 0, :32].t()).fill_diagonal_(0).abs().max() < 0.1
    made = torch.stack([restored(grouped(rows[0], 2, 256, scattered(torch.tensor(i)))) for i in range(4000)])
    seldom = 5 * float(rows.max() - rows.min()) / 3 / 4000
    assert bool(((made.mean(0) - rows[0]).abs() <= 5 * made.std(0) / 4000**0.5 + seldom).all())
    assert drawn_by(None) is None


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_says_the_same_of_a_compiled_model() -> None:
    model, x = net().cuda(), torch.randn(4096, 64, device="cuda")
    program = rewrite.apply(model, "compress-activations{bits=4}", args=(x,), verify=False)

    def growth(module: nn.Module) -> int:
        torch.compiler.reset()
        run = torch.compile(module.train())
        run(x).sum().backward()
        before = torch.cuda.memory_allocated()
        y = run(x)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()

    assert growth(program.module) < 0.3 * growth(copy.deepcopy(model))
