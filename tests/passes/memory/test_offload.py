"""offload: what moves and what stays, there and back, on a device where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from rewrite import RewriteError
from rewrite.training.offload import Mover, check
from tests.passes.table import Row

ROWS = [
    Row("offload{min_size=64}", "vit", {"offload"}),
    Row("offload", "Frozen", 0),
]

X = torch.randn(32, 64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 8))


def test_a_tensor_comes_back_as_it_lay_and_a_storage_moves_once() -> None:
    mover = Mover(frozenset(), 1)
    whole = torch.randn(6, 8)
    part = whole.t()[1:4]
    moved = [mover.moved(each) for each in (whole, part)]
    assert moved[0].storage is moved[1].storage
    assert moved[0].storage.data_ptr() != whole.data_ptr()
    back = [mover.unpack(each) for each in moved]
    assert torch.equal(back[0], whole)
    assert torch.equal(back[1], part)
    assert back[1].stride() == part.stride()


def test_on_the_host_nothing_moves_and_it_says_so() -> None:
    program = rewrite.apply(net(), "offload", args=(X,))
    assert rewrite.memory(program).bytes == rewrite.memory(net(), (X,)).bytes
    assert program.history[-1].warnings[0].startswith("the model is on the CPU, where nothing moves")


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(RewriteError, match="min_size of 1 or more"):
        check({"min_size": 0})


@pytest.mark.gpu
def test_on_a_gpu_the_device_keeps_the_small_ones_alone() -> None:
    model, x = net().cuda(), X.cuda()
    program = rewrite.apply(model, "offload", args=(x,))
    wanted, found = (torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, program.module.train()))
    assert all(map(torch.equal, wanted, found))

    def growth(module: nn.Module) -> int:
        before = torch.cuda.memory_allocated()
        y = module(x)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()

    assert growth(program.module) < 0.1 * growth(model)
