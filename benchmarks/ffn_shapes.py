"""FFNs of a Llama in bfloat16 on a GPU, in runs of 2, 4 and 8: one after the other, side by side, and fused.

    python benchmarks/ffn_shapes.py [--shapes 4096x14336,8192x28672] [--backends eager,inductor] [--rounds 15]

Milliseconds of one call of one token at batch 1 and 32, the fastest tenth of bursts that take turns; for the three forms in
this order the kernels that a call launches, and how many matrix products wait for each other. `--device cpu` tries it out.
"""

from __future__ import annotations

import argparse
import time

import torch
from depth import FFN, Parallel, latencies
from torch import Tensor, nn

import rewrite
from rewrite import Program
from rewrite.analysis.costs import depth_of
from rewrite.analysis.view import critical_path

COLUMNS = ("hidden", "run", "backend", "batch", "sequential, ms", "parallel", "fused", "sequential over fused", "kernels")
RUNS, BATCHES = (2, 4, 8), (1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x14336,8192x28672", help="hidden sizes of the stream and of an FFN")
    parser.add_argument("--backends", default="eager,inductor")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU (--device cpu, with small --shapes, tries the script out)")
    name = torch.cuda.get_device_name(0) if options.device == "cuda" else options.device
    print(f"torch {torch.__version__}, {name}, {time.strftime('%Y-%m-%d')}\n")
    print(f"| {' | '.join(COLUMNS)} | in a row |\n{'| --- ' * (len(COLUMNS) + 1)}|")
    for shape in options.shapes.split(","):
        width, hidden = map(int, shape.split("x"))
        for run in RUNS:
            rows(width, hidden, run, options)


def rows(width: int, hidden: int, run: int, options: argparse.Namespace) -> None:
    """A row for each backend and batch."""
    with torch.device(options.device):
        torch.manual_seed(0)
        model = nn.Sequential(*(FFN(width, hidden) for _ in range(run))).to(torch.bfloat16).requires_grad_(False)
        x = torch.randn(max(BATCHES), 1, width, dtype=torch.bfloat16)
    sequential = rewrite.capture(model, (x[:2],))
    fused = rewrite.apply(sequential, f"ffn-fusion{{where='0-{run - 1}' window={run} bound=9}}", verify=False)
    forms = [sequential, rewrite.capture(Parallel(model, run), (x[:2],)), fused]
    chains = ", ".join(str(in_a_row(form)) for form in forms)
    for backend in options.backends.split(","):
        for batch in BATCHES:
            times = latencies(forms, (x[:batch],), options.rounds, backend)
            launched = ", ".join(str(kernels(form, x[:batch], backend)) for form in forms)
            told = " | ".join(f"{t:.3f}" for t in times)
            ratio = f"{times[0] / times[2]:.2f}"
            print(f"| {width} | {run} | {backend} | {batch} | {told} | {ratio} | {launched} | {chains} |", flush=True)


def in_a_row(program: Program) -> int:
    """The matrix products of the critical path."""
    return round(critical_path(program, lambda node: depth_of(program, node))[1])


def kernels(program: Program, x: Tensor, backend: str) -> int:
    """How many kernels one call launches; 0 where there is no GPU."""
    run = rewrite.lower(program, backend)
    with torch.no_grad():
        run(x)
        with torch.profiler.profile() as profiler:
            run(x)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ())


if __name__ == "__main__":
    main()
