"""Time a LayerNorm model against what exact passes make of it: forward and training step, in each lowering.

    python benchmarks/norms.py [--device cpu|cuda] [--dtype float32|bfloat16] [--width 384] [--layers 6] [--rounds 20]

A pre-norm transformer of plain layers. All candidates of one kind are timed in one process, in rounds, each round in an
order drawn anew; the table holds medians in milliseconds and, in brackets, the ratio to the model as it is.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lowering import WARM_UP, Candidate, environment, measure
from torch import Tensor, nn

import rewrite

PIPELINES = ("", "rmsnorm", "rmsnorm{compressed=true}", "fold-affine", "rmsnorm, fold-affine", "dyt")


class Block(nn.Module):
    """Attention and FFN, each behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Model(nn.Module):
    """A decoder over 1,000 tokens."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(1000, width), nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


def forwards(programs: dict[str, rewrite.Program], lowering: str, ids: Tensor) -> list[Candidate]:
    """The programs in one lowering, without gradients."""
    found = []
    for name, program in programs.items():
        run = rewrite.lower(program, lowering, **({"dynamic": False} if lowering == "inductor" else {}))
        found.append(warmed(name, run, ids))
    return found


def steps(programs: dict[str, rewrite.Program], compiled: bool, ids: Tensor) -> list[Candidate]:
    """Forward and backward of the programs."""
    return [warmed(name, step(program, compiled), ids) for name, program in programs.items()]


def step(program: rewrite.Program, compiled: bool) -> Callable[[Tensor], None]:
    module = program.module.train()
    called: Any = torch.compile(module, dynamic=False) if compiled else module

    def run(ids: Tensor) -> None:
        module.zero_grad()
        called(ids).square().mean().backward()

    return run


def warmed(name: str, run: Callable[..., Any], ids: Tensor) -> Candidate:
    for _ in range(WARM_UP):
        run(ids)
    return Candidate(name or "as it is", run, 0.0, 0.0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    ids = torch.randint(1000, (options.batch, options.tokens))
    program = rewrite.capture(Model(options.width, options.layers), (ids,))
    programs = {text: rewrite.apply(program, text, verify=False) if text else program for text in PIPELINES}
    for made in programs.values():
        made.module.to(options.device, getattr(torch, options.dtype))
    ids = ids.to(options.device)
    print(f"{environment(options.device)}; {vars(options)}\n")
    kinds = {f"forward, {name}": lambda name=name: forwards(programs, name, ids) for name in ("eager", "inductor")}
    if options.dtype == "float32":
        kinds["forward, ONNX Runtime"] = lambda: forwards(programs, "onnxruntime", ids)
    kinds |= {"step, eager": lambda: steps(programs, False, ids), "step, compiled": lambda: steps(programs, True, ids)}
    columns = {}
    for kind, make in kinds.items():
        columns[kind] = make()
        measure(columns[kind], (ids,), {}, options.rounds)
    print(f"| pipeline | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for i, text in enumerate(PIPELINES):
        cells = [f"{1e3 * c[i].median:.1f} ({c[i].median / c[0].median:.2f})" for c in columns.values()]
        print(f"| {f'`{text}`' if text else 'as it is'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
