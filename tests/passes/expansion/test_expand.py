"""expand: the models the kit tries it on, the weights by hand, training afterwards, and each refusal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, RewriteError, apply, capture
from tests.passes.table import Row

ROWS = [
    Row("expand{ffn=2x heads=+2}", "bert", 32, again=32, compiled=True),
    Row("expand{ffn=2x heads=+2}", "llama", 28, again=28),
    Row("expand{ffn=+8}", "gpt2", 10, again=10),
    Row("expand{ffn=2x}", "resnet18", 0),
]


class Block(nn.Module):
    """x + down(act(up(norm(x))))."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.last = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6), last

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.last(nn.functional.gelu(self.up(self.norm(x)))))


def block(last: nn.Module | None = None) -> Program:
    torch.manual_seed(0)
    return capture(Block(last or nn.Identity()), (torch.randn(3, 4, 6),))


def test_the_weights_by_hand() -> None:
    before = block()
    old = dict(before.module.named_parameters())
    new = dict(apply(before, "expand{ffn=+3}").module.named_parameters())
    assert torch.equal(new["up.weight"][:8], old["up.weight"])
    assert torch.equal(new["down.weight"][:, :8], old["down.weight"])
    assert not new["down.weight"][:, 8:].any()
    assert bool((new["up.weight"][8:] != 0).all())
    assert torch.equal(new["norm.weight"], old["norm.weight"])


def test_no_new_parameter_stays_untrained_and_no_two_are_equal() -> None:
    module = apply(block(), "expand{ffn=+3}").module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(16, 4, 6)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    module(x).square().mean().backward()
    found = dict(module.named_parameters())
    for name, rows in (("up.weight", slice(8, None)), ("up.bias", slice(8, None))):
        gradient = found[name].grad
        assert gradient is not None
        assert bool((gradient[rows] != 0).all())
    units = found["up.weight"][8:]
    assert torch.pdist(units).min() > 1e-3


@pytest.mark.parametrize(("text", "size"), [("12", 12), ("+1", 9), ("1.5x", 12), ("8", 8)])
def test_sizes(text: str, size: int) -> None:
    found = apply(block(), f"expand{{ffn={text}}}").module.get_parameter("up.weight")
    assert found.shape == (size, 6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expand{ffn=4}", "ffn.0 is 8 and would be 4: expand grows"),
        ("expand{ffn=1.3x}", "no whole number"),
        ("expand{ffn=many}", "a size is a number"),
        ("expand{ffn=2x where=heads.*}", "matches none"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        apply(block(), text)


def test_entries_that_meet_in_a_norm_are_left_alone() -> None:
    record = apply(block(nn.LayerNorm(8)), "expand{ffn=2x}").history[-1]
    assert record.changes == ()
    assert "meet in norm" in record.skipped[0].reason
