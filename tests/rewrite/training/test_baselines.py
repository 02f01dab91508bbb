"""Ways of training beside each other: what they keep and the peak, against the allocator and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.training.baselines import compared, peak_of
from tests.captures import capture, shared
from tests.rewrite.training.test_saved import left_allocated


def test_the_peak_is_the_most_that_was_alive_at_once() -> None:
    """1 MiB and 2 MiB together, then 2.5 MiB alone."""

    def run() -> None:
        first, second = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**21, dtype=torch.uint8)
        del first, second
        torch.empty(5 * 2**19, dtype=torch.uint8)

    assert peak_of(run, torch.device("cpu")) == pytest.approx(3 * 2**20, rel=0.01)


@pytest.mark.parametrize("text", ["recompute", "share-norm", "fit-memory{budget=0.5}", "compress-activations{min_size=64}"])
def test_with_passes_the_allocator_agrees(text: str) -> None:
    program = rewrite.apply(shared("vit"), text, verify=False)
    assert rewrite.memory(program).bytes == pytest.approx(left_allocated(program), rel=0.01)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.up(x).tanh())
        return found


def test_checkpoints_keep_what_blocks_are_given() -> None:
    """4 blocks of [512, 64]; the first one's input is that of the layer before, which nobody else keeps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Block(), Block(), Block(), Block())
    program = capture(model, (torch.randn(512, 64),))
    eager, checkpoints = compared(program, compiled=False).rows
    assert eager.bytes == rewrite.memory(program).bytes
    assert checkpoints.bytes == 4 * 512 * 64 * 4
    assert checkpoints.bytes < checkpoints.peak < eager.peak
