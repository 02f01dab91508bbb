"""upcycle: the models the kit tries it on, the mixture by hand, that experts part in training, what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, RewriteError, apply, graft
from tests.captures import capture, shared
from tests.passes.table import Row

ROWS = [
    Row("upcycle{experts=3 top_k=2}", "gpt2", 28, again=0),
    Row("upcycle{experts=2 noise=0.01}", "llama", 16, again=0),
    Row("upcycle", "EncoderLayer", 0),
]


class FFN(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(6, 8), nn.Dropout(rate), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(nn.functional.gelu(self.up(x))))


class Block(nn.Module):
    """x + ffn(norm(x))."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(6), FFN(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def block(rate: float = 0.0) -> tuple[Block, Program]:
    torch.manual_seed(0)
    made = Block(rate).train()
    return made, capture(made, (torch.randn(3, 4, 6),))


def test_the_mixture_by_hand_and_in_the_users_class() -> None:
    model, before = block()
    program = apply(before, "upcycle{experts=4 top_k=2}")
    found = dict(program.module.named_parameters())
    assert found["ffn.router.weight"].shape == (4, 6)
    for e in range(4):
        assert torch.equal(found[f"ffn.experts.{e}.up.weight"], model.ffn.up.weight)
    x = torch.randn(5, 7, 6)
    assert torch.allclose(program.module(x), model(x), atol=1e-6)
    grafted = graft(program, model)
    assert torch.equal(grafted(x), program.module(x))


def test_experts_part_in_training() -> None:
    module = apply(block()[1], "upcycle{experts=4}").module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(64, 4, 6)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    weights = [module.get_parameter(f"ffn.experts.{e}.up.weight") for e in range(4)]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])
    router = module.get_parameter("ffn.router.weight").grad
    two = apply(block()[1], "upcycle{experts=3 top_k=2 noise=0.1}").module.train()
    two(x).square().mean().backward()
    gradient = two.get_parameter("ffn.router.weight").grad
    assert router is not None
    assert gradient is not None
    assert bool((gradient != 0).any())


def test_what_is_left_alone_and_refused() -> None:
    record = apply(block(0.5)[1], "upcycle").history[-1]
    assert record.changes == ()
    assert "ffn.drop drops out within it" in record.skipped[0].reason
    with pytest.raises(RewriteError, match="at least 2"):
        apply(block()[1], "upcycle{top_k=1}")
    with pytest.raises(RewriteError, match="fewer experts than top_k"):
        apply(block()[1], "upcycle{experts=2 top_k=3}")


def test_a_block_that_is_nothing_but_an_ffn() -> None:
    """The FFN in it becomes a mixture, the sum around it stays (gMLP)."""
    program = capture(nn.Sequential(nn.Linear(4, 6), Block(), Block()), (torch.randn(3, 4, 4),))
    names = [name for name, _ in apply(program, "upcycle").module.named_parameters() if name.endswith("router.weight")]
    assert names == ["1.ffn.router.weight", "2.ffn.router.weight"]


def test_experts_with_an_activation_that_is_spelled_out() -> None:
    """GPT-2's, which runs its graph as an expert runs its own."""
    (record,) = apply(shared("gpt2"), "upcycle{experts=2 noise=0.01}").history
    assert record.verification


def test_what_another_pass_put_into_an_ffn_goes_into_each_expert() -> None:
    """The formula may compute with it, but not with the mixture."""
    program = apply(shared("vit"), "rezero{init=0.5},upcycle{experts=2 noise=0.01}")
    names = [name for name, _ in program.module.named_parameters() if ".experts." in name and name.endswith("gain.scale")]
    assert len(names) == 4, names
