"""drop-blocks: the models the kit tries it on, and what is left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import apply
from rewrite.analysis.branches import branches
from rewrite.torch_private import pytree
from tests.captures import capture, shared
from tests.passes.table import Row

ROWS = [
    Row("drop-blocks{layers=1}", "vit", 15),
    Row("drop-blocks{layers=0}", "TiedHead", 0),
]


def test_all_branches_of_a_layer_go() -> None:
    for name in ("gpt2", "llama", "convnext_atto", "resnet18"):
        before = [b.path for b in branches(shared(name)) if b.layer != 1]
        assert [b.path for b in branches(apply(shared(name), "drop-blocks{layers=1}"))] == before, name


class Parallel(nn.Module):
    """x + (attention + FFN), added up before they meet the stream, through a dropout where ``dropped``."""

    def __init__(self, dropped: bool) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.1) if dropped else nn.Identity()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(n).chunk(3, -1))
        attended = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.drop(self.down(F.gelu(self.up(n))) + attended)


@pytest.mark.parametrize("dropped", [False, True])
def test_branches_that_are_added_up_first_go_both(dropped: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), Parallel(dropped), Parallel(dropped), nn.Linear(8, 2))
    program = apply(model, "drop-blocks{layers=1 bound=9}", args=(torch.randn(2, 5, 4),))
    assert [b.path.partition(".")[0] for b in branches(program)] == ["1", "1"]
    x = torch.randn(2, 5, 4)
    assert torch.allclose(program.module.eval()(x), nn.Sequential(model[0], model[1], model[3]).eval()(x), atol=1e-6)


def test_what_is_left_trains_where_an_activation_writes_in_place() -> None:
    """A ResNet's last activation wrote into the sum that goes, and would now write into what the one before keeps."""
    program = apply(shared("resnet18"), "drop-blocks{layers=1}")
    assert not program.module.get_submodule("layer1.1.act2").inplace
    module = copy.deepcopy(program.module).train()
    sum(t.sum() for t in pytree.tree_leaves(module(*program.example_args))).backward()
    assert module.get_parameter("conv1.weight").grad.abs().max() > 0
    names = [check.name for check in program.history[-1].verification.checks]
    assert "trains" in names


def test_blocks_that_are_numbered_within_a_name() -> None:
    """As RegNet's s3.b2: each is a layer of its own."""
    model = nn.Sequential()
    for name in ("b1", "b2", "b3"):
        model.add_module(name, Residual())
    program = capture(model, (torch.randn(2, 8),))
    assert [(b.layer, b.path) for b in branches(program)] == [(0, "b1"), (1, "b2"), (2, "b3")]
    assert [b.path for b in branches(apply(program, "drop-blocks{layers=1 bound=9}"))] == ["b1", "b3"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))
