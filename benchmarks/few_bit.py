"""What few-bit saves and costs in training, and what its opaque operator costs Inductor against plain operators.

    python benchmarks/few_bit.py [--width 256] [--tokens 512] [--bits 3]

One thread, a linear layer, an activation and a linear layer, one forward and backward pass. `operator` is what the pass puts
in; `plain` is the same gradient written as an autograd function in plain operators, which Inductor may fuse.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite.passes.memory.few_bit import FewBit
from rewrite.training.packing import pack, unpack
from rewrite.training.steps import Steps, best_steps

ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bits", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {options}")
    steps = best_steps(F.gelu, options.bits)
    print("| activation | eager, ms | compiled, ms | saved, KiB |\n| --- | --- | --- | --- |")
    for name, activation in {"GELU": nn.GELU(), "operator": FewBit(nn.GELU(), steps), "plain": Plain(steps)}.items():
        print(f"| {name} | {row(activation, options.width, options.tokens)} |", flush=True)


def row(activation: nn.Module, width: int, tokens: int) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))
    x = torch.randn(tokens, width)
    eager = milliseconds(model, x)
    saved = saved_bytes(model, x)
    torch._dynamo.reset()
    compiled = milliseconds(torch.compile(model, fullgraph=True), x)
    return f"{eager:.1f} | {compiled:.1f} | {saved / 1024:.0f}"


def milliseconds(model: Callable[..., Any], x: Tensor) -> float:
    """The median of a step."""
    times = []
    for _ in range(ROUNDS + 3):
        began = time.perf_counter()
        model(x).square().sum().backward()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), x]}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model(x)
    del kept
    return sum(found.values())


class Plain(nn.Module):
    """GELU with the gradient of few-bit, in plain operators."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = PlainFunction.apply(x, self.steps.borders, self.steps.levels)  # type: ignore[no-untyped-call]
        return found


class PlainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, borders: tuple[float, ...], levels: tuple[float, ...]) -> Tensor:
        place = (x > borders[0]).view(torch.uint8)
        for border in borders[1:]:
            place = place + (x > border).view(torch.uint8)
        ctx.save_for_backward(pack(place, (len(levels) - 1).bit_length()))
        ctx.levels = levels
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        place = unpack(ctx.saved_tensors[0], grads[0].numel()).view(grads[0].shape)
        return torch.tensor(ctx.levels, dtype=grads[0].dtype)[place.int()] * grads[0], None, None


if __name__ == "__main__":
    main()
